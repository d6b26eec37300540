"""MABN2d under activation checkpointing: the second pass repeats the first and counts nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rethinking_bn.layers.mabn import MABN2d

C = 4
Run = Callable[..., Tensor]
TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def plain(fn: Run, *xs: Tensor) -> Tensor:
    return fn(*xs)


def reentrant(fn: Run, *xs: Tensor) -> Tensor:
    return checkpoint(fn, *xs, use_reentrant=True)


def not_reentrant(fn: Run, *xs: Tensor) -> Tensor:
    return checkpoint(fn, *xs, use_reentrant=False)


def nested(fn: Run, *xs: Tensor) -> Tensor:
    return checkpoint(lambda *xs: reentrant(fn, *xs), *xs, use_reentrant=True)


class Model(nn.Module):
    """Two layers of ours, one of them used several times, with weights of their own between."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {
            "simulated_batch_size": 6,
            "batch_size": 2,
            "warmup_iters": 5,
            "correction_start": 8,
            "r_max": 1.05,
        }
        self.norm = MABN2d(C, **options)
        self.shared = MABN2d(C, **options)
        self.convs = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(4))

    def stem(self, x: Tensor) -> Tensor:
        return self.norm(self.convs[0](x)).relu()

    def twice(self, x: Tensor) -> Tensor:
        """Two uses of a layer in one segment, on inputs that differ."""
        x = self.shared(self.convs[1](x)).relu()
        return self.shared(self.convs[2](x)).relu()

    def once(self, x: Tensor) -> Tensor:
        """A use in another segment, and a repetition on the very same input."""
        x = self.convs[3](x)
        return self.shared(x) + 2 * self.shared(x).relu()

    def forward(self, x: Tensor, run: Run) -> Tensor:
        for segment in (self.stem, self.twice, self.once):
            x = run(segment, x)
        return x


def step(model: Model, x: Tensor, dy: Tensor, run: Run) -> list[Tensor]:
    """Return the output and the gradients of the input and of every parameter."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x, run)
    y.backward(dy)
    return [y.detach(), *(v.grad for v in (x, *model.parameters()) if v.grad is not None)]


@pytest.mark.parametrize("run", [reentrant, not_reentrant, nested])
def test_same_as_without(run):
    """Outputs, gradients and state, across warm-up, ring and clipping boundaries."""
    torch.manual_seed(0)
    expected_model = Model()
    model = copy.deepcopy(expected_model)
    for t in range(12):
        x = torch.randn(2, C, 5, 5) * (1 + t % 3)
        dy = torch.randn_like(x)
        expected = step(expected_model, x, dy, plain)
        got = step(model, x, dy, run)
        assert len(got) == len(expected)
        # nothing but the order in which the uses' gradients are added may differ
        torch.testing.assert_close(got, expected, **TIGHT)
        torch.testing.assert_close(model.state_dict(), expected_model.state_dict(), **TIGHT)
    assert model.norm.iterations == 12 and model.shared.iterations == 48
    assert model.shared.gradient_ring.pushed == 48


@pytest.mark.parametrize("run", [reentrant, not_reentrant])
def test_two_forwards_before_their_backwards(run):
    """As in a pipeline; and across the end of the warm-up, so the phases differ too."""
    torch.manual_seed(0)
    expected_model = Model()
    model = copy.deepcopy(expected_model)
    results = []
    for m, r in ((expected_model, plain), (model, run)):
        torch.manual_seed(1)
        xs = [(torch.randn(2, C, 5, 5) * k).requires_grad_() for k in range(1, 8)]
        ys = [m(x, r) for x in xs]
        for y in reversed(ys):
            y.sum().backward()
        results.append([x.grad for x in xs] + [p.grad for p in m.parameters()])
    torch.testing.assert_close(*results, **TIGHT)
    torch.testing.assert_close(model.state_dict(), expected_model.state_dict(), **TIGHT)


@pytest.mark.parametrize("run", [reentrant, not_reentrant])
def test_the_same_input_in_every_iteration(run):
    """Records of earlier iterations, which look the same, are not taken again."""
    layer = MABN2d(C, simulated_batch_size=2, batch_size=2, warmup_iters=0, correction_start=0)
    twin = copy.deepcopy(layer)
    x = torch.randn(2, C, 4, 4, requires_grad=True)
    for _ in range(4):
        # the r of every iteration is another one
        x.grad = None
        run(lambda x: layer(x).square(), x).sum().backward()
        got = x.grad
        (want,) = torch.autograd.grad(twin(x).square().sum(), x)
        torch.testing.assert_close(got, want, **TIGHT)


def test_backward_twice_through_a_checkpoint():
    layer = MABN2d(C, simulated_batch_size=2, batch_size=2, warmup_iters=3)
    x = torch.randn(2, C, 4, 4, requires_grad=True)
    y = not_reentrant(lambda x: layer(layer(x)), x)
    grads = [torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)
    assert layer.iterations == 2


def test_segment_without_gradient_of_its_own():
    """The layer has no graph, but a later layer's gradient needs its recomputed output."""
    torch.manual_seed(0)
    layer = MABN2d(C, simulated_batch_size=4, batch_size=2, warmup_iters=0).requires_grad_(False)
    conv = nn.Conv2d(C, C, 1)
    twin = copy.deepcopy(layer)
    for t in range(5):
        x = torch.randn(2, C, 4, 4) * (t + 1)
        y = not_reentrant(lambda x: conv(layer(x)), x)
        (got,) = torch.autograd.grad(y.square().sum(), conv.weight)
        (want,) = torch.autograd.grad(conv(twin(x)).square().sum(), conv.weight)
        assert torch.equal(got, want)
    assert layer.iterations == 5
