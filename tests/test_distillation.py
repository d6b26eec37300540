"""The soft-target losses against the formulas written out in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rethinking_bn.distillation import binary_kl_soft_loss, kl_soft_loss


def softmax_reference(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """Sum over classes, mean over the other positions, T²; position by position."""
    s = student.double().movedim(1, -1).flatten(0, -2)
    g = teacher.double().movedim(1, -1).flatten(0, -2)
    total = torch.zeros((), dtype=torch.float64)
    for row_s, row_t in zip(s, g, strict=True):
        p = [math.exp(v / t) for v in row_t.tolist()]
        q = (row_s / t).exp() / (row_s / t).exp().sum()
        for k, mass in enumerate(p):
            mass /= sum(p)
            total = total + mass * (math.log(mass) - q[k].log())
    return t * t * total / len(s)


def sigmoid_reference(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    q = 1 / (1 + (-student.double() / t).exp())
    p = 1 / (1 + (-teacher.double() / t).exp())
    each = p * (p.log() - q.log()) + (1 - p) * ((1 - p).log() - (1 - q).log())
    return t * t * each.mean()


LOSSES: Any = [(kl_soft_loss, softmax_reference), (binary_kl_soft_loss, sigmoid_reference)]
BOTH: Any = pytest.mark.parametrize(("loss", "reference"), LOSSES)


@BOTH
@pytest.mark.parametrize("temperature", [1.0, 5.0])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (2, 3, 2, 2)])
def test_value_and_gradient(loss: Any, reference: Any, temperature: float, shape: Any) -> None:
    student = (3 * torch.randn(shape)).requires_grad_()
    teacher = (3 * torch.randn(shape)).requires_grad_()
    value = loss(student, teacher, temperature)
    twin = student.detach().clone().requires_grad_()
    expected = reference(twin, teacher.detach(), temperature)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    value.backward()
    expected.backward()
    torch.testing.assert_close(student.grad, twin.grad, rtol=1e-5, atol=1e-7)
    assert teacher.grad is None


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_against_itself(loss: Any, reference: Any, dtype: torch.dtype) -> None:
    logits = (50 * torch.randn(8, 5)).to(dtype).requires_grad_()
    value = loss(logits, logits.detach().clone(), 1.0)
    assert value.item() == 0.0 and value.dtype == torch.float32
    value.backward()
    assert logits.grad.abs().max() < 1e-6


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(loss: Any, reference: Any, dtype: torch.dtype) -> None:
    """A mean over 100000 positions, near certainty, at the values the types can hold."""
    student = (8 * torch.randn(1000, 4)).to(dtype).requires_grad_()
    teacher = (8 * torch.randn(1000, 4)).to(dtype)
    value = loss(student.repeat(100, 1), teacher.repeat(100, 1), 1.0)
    expected = reference(student.detach(), teacher, 1.0)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)
    value.backward()
    assert student.grad.dtype == dtype and student.grad.isfinite().all()


@BOTH
def test_extreme_logits(loss: Any, reference: Any) -> None:
    student = torch.tensor([[2e4, -2e4], [1e4, 3e4]]).requires_grad_()
    teacher = torch.tensor([[2e4, -2e4], [3e4, -1e4]])
    value = loss(student, teacher, 1.0)
    value.backward()
    assert value.isfinite() and value > 1e3 and student.grad.isfinite().all()
    impossible = torch.tensor([[0.0, -math.inf], [0.0, 0.0]])
    assert loss(impossible.clone(), impossible, 1.0) == 0.0
    student = torch.zeros(2, 2).requires_grad_()
    loss(student, impossible, 1.0).backward()
    assert student.grad.isfinite().all()


@BOTH
@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0)])
def test_nothing_costs_nothing(loss: Any, reference: Any, shape: Any) -> None:
    student = torch.zeros(shape).requires_grad_()
    value = loss(student, torch.zeros(shape))
    assert value.item() == 0.0
    value.backward()  # a rank without positions takes part in the backward
    assert student.grad.shape == shape


@BOTH
def test_wrong_arguments(loss: Any, reference: Any) -> None:
    with pytest.raises(ValueError, match="dimension 1"):
        kl_soft_loss(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature)
