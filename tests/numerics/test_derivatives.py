"""Derivatives of a second order, in forward mode, and of many gradients at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from rethinking_bn.layers import BatchNorm2d, CycleBatchNorm2d, MultiDomainBatchNorm2d
from tests import reference
from tests.helpers import run_distributed
from tests.layers.kinds import ALL_EIGHT, affine_of, run, with_choices
from tests.reference import CHANNELS

SHAPES = [(3, 4), (2, 2), (1, 1)]
Function = Callable[[list[Tensor]], list[Tensor]]


def rows(choices: tuple[str, ...]) -> tuple[Function, Function, list[Tensor]]:
    """Return a layer, the same written out, and its parameters."""
    layer = with_choices(choices, levels=len(SHAPES), dtype=torch.float64)
    for i, parameter in enumerate(layer.parameters()):
        nn.init.constant_(parameter, 0.5 + 0.1 * i)

    def written_out(xs: list[Tensor]) -> list[Tensor]:
        outputs = []
        for i, x in enumerate(xs):
            pool = xs if choices[0] == "shared" else [x]
            outputs += reference.normalize([x], pool, *affine_of(layer, i))
        return outputs

    return layer, written_out, list(layer.parameters())


def penalty(function: Function, xs: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """Return the gradients of a gradient penalty, whose own incoming gradient needs none."""
    xs = [x.detach().requires_grad_() for x in xs]
    torch.manual_seed(1)
    loss = sum((y * torch.randn_like(y)).sum() for y in function(xs))
    gradients = torch.autograd.grad(loss, xs, create_graph=True)
    total = sum(g.pow(2).sum() + g.sum() for g in gradients)
    found = torch.autograd.grad(total, [*xs, *parameters], allow_unused=True)
    zeros = (torch.zeros_like(t) for t in (*xs, *parameters))
    return [zero if g is None else g for g, zero in zip(found, zeros, strict=True)]


@pytest.mark.parametrize("choices", ALL_EIGHT)
def test_a_gradient_penalty_equals_the_written_out_one(choices: tuple[str, ...]) -> None:
    """Defect 36: it was wrong in silence."""
    layer, written_out, parameters = rows(choices)
    xs = reference.levels(shapes=SHAPES)
    torch.testing.assert_close(penalty(layer, xs, parameters), penalty(written_out, xs, parameters))


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 16, 128, 128), (3, 4, 1, 1), (1, 4, 1, 1)])
@pytest.mark.parametrize("last", [False, True])
def test_one_tensor_of_any_size(shape: tuple[int, ...], last: bool) -> None:  # defect 36
    layer = BatchNorm2d(shape[1]).double()
    x = torch.randn(shape, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if last else x
    parameters = list(layer.parameters())

    def written_out(xs: list[Tensor]) -> list[Tensor]:
        return reference.normalize(xs, xs, layer.weight, layer.bias)

    got = penalty(lambda xs: [layer(xs[0])], [x], parameters)
    want = penalty(written_out, [x], parameters)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_a_weight_that_made_the_input_counts_once_on_every_way() -> None:
    """The same layer twice: the graph of the inner gradients ends at the layer's own input."""
    layer, written_out, parameters = rows(ALL_EIGHT[0])

    def twice(function: Function) -> Function:
        return lambda xs: function([y.tanh() for y in function(xs)])

    xs = reference.levels(shapes=SHAPES)
    got, want = (penalty(twice(f), xs, parameters) for f in (layer, written_out))
    torch.testing.assert_close(got, want)


def _refused(rank: int) -> list[str]:
    said = []
    for layer in (
        MultiDomainBatchNorm2d(CHANNELS, 2, sync=True),
        MultiDomainBatchNorm2d(CHANNELS, 2, sync=True, affine="domain_specific"),
    ):
        xs = [torch.randn(2, CHANNELS, s, s, requires_grad=True) for s in (3, 2)]
        loss = sum((y * torch.randn_like(y)).sum() for y in layer(xs))
        gradients = torch.autograd.grad(loss, xs, create_graph=True)
        try:
            sum(g.square().sum() for g in gradients).backward()
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_over_ranks_it_is_refused() -> None:
    for said in run_distributed(_refused, 2):
        assert len(said) == 2 and all("derivative of a derivative" in text for text in said)


@pytest.mark.parametrize("choices", ALL_EIGHT[:3])
def test_forward_mode(choices: tuple[str, ...]) -> None:
    layer, written_out, _ = rows(choices)
    xs = reference.levels(shapes=SHAPES)
    tangents = [torch.randn_like(x) for x in xs]
    results: list[Any] = []
    for function in (layer, written_out):
        with forward_ad.dual_level():
            ys = function([forward_ad.make_dual(x, t) for x, t in zip(xs, tangents, strict=True)])
            results.append([forward_ad.unpack_dual(y) for y in ys])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("choices", [*ALL_EIGHT[:3], ALL_EIGHT[-1]])
def test_batched_gradients(choices: tuple[str, ...]) -> None:
    layer, written_out, parameters = rows(choices)
    results = []
    for function in (layer, written_out):
        xs = [x.requires_grad_() for x in reference.levels(shapes=SHAPES)]
        ys = function(xs)
        torch.manual_seed(2)
        many = [torch.randn(3, *y.shape, dtype=y.dtype) for y in ys]
        results.append(torch.autograd.grad(ys, [*xs, *parameters], many, is_grads_batched=True))
    torch.testing.assert_close(*results)


def test_the_cycle_layer_has_second_derivatives() -> None:
    layer = CycleBatchNorm2d(CHANNELS, len(SHAPES), dtype=torch.float64)

    def written_out(xs: list[Tensor]) -> list[Tensor]:
        return [reference.normalize([x], [x], layer.weight, layer.bias)[0] for x in xs]

    xs, parameters = reference.levels(shapes=SHAPES), list(layer.parameters())
    torch.testing.assert_close(
        penalty(partial(run, layer), xs, parameters)[:-1], penalty(written_out, xs, parameters)[:-1]
    )
