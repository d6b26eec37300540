"""What the cases share: features, a reference in float64, a count of launches, the worst errors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from rethinking_bn.numerics.triton import backward, forward, moving
from tests import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
C = 2
SHAPES = [(2, C, 5, 3), (0, C, 2, 2), (1, C, 1, 1)]
ROWS = list(itertools.product(("shared", "domain_specific"), repeat=3))
WORST: dict[str, float] = {}
CASES = [0]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the names of what is launched."""
    launched: list[str] = []

    class Counting:
        def __init__(self, name: str, kernel) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    names = {
        forward: ("moments", "merge", "normalize"),
        backward: ("gradient_sums", "merge_sums", "input_gradient"),
        moving: ("advance", "average", "scale_and_shift", "combine"),
    }
    with monkeypatch.context() as patch:
        for module, kernels in names.items():
            for name in kernels:
                patch.setattr(module, name, Counting(name, getattr(module, name)))
        yield launched


def features(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, last: bool, offset: float = 0.0
) -> list[Tensor]:
    """Tensors whose mean and spread differ from level to level, or are ``offset`` ± 1."""
    xs = []
    for i, shape in enumerate(shapes):
        x = torch.randn(shape) * (1 if offset else 1 + i) + (offset or 3 * i)
        xs.append(
            x.to(DEVICE, dtype)
            .to(memory_format=torch.channels_last if last else torch.contiguous_format)
            .requires_grad_()
        )
    return xs


def close(what: str, got: Tensor | None, expected: Tensor, tolerance: float, scale=1.0) -> None:
    """Compare with float64, relative to the largest value or to ``scale``."""
    assert got is not None, what
    assert got.shape == expected.shape, what
    if expected.numel() == 0:
        return
    largest = max(expected.abs().max().item(), scale)
    error = (got.detach().cpu().double() - expected.cpu()).abs().max().item() / largest
    assert error <= tolerance, f"{what}: {error:.2e} of {largest:.2e}, allowed {tolerance:.1e}"
    if got.dtype == torch.float32:
        name = what.split(",")[0]
        WORST[name] = max(WORST.get(name, 0.0), error)


class Expected:
    """A training step of a layer of ours, written out in float64."""

    def __init__(self, xs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]):
        self.xs = [x.detach().cpu().double().requires_grad_() for x in xs]
        self.affine = [
            [p.detach().cpu().double().requires_grad_() for p in ps] for ps in (weights, biases)
        ]

    def outputs(self, pooled: bool) -> list[Tensor]:
        return [
            reference.normalize(
                [x],
                self.xs if pooled else [x],
                *(ps[i if len(ps) > 1 else 0] for ps in self.affine),
            )[0]
            if x.numel()
            else x * self.affine[0][0].sum()
            for i, x in enumerate(self.xs)
        ]


def averages(
    parts: Sequence[Sequence[Tensor]], holders: int, momentum: float | None
) -> list[tuple[Tensor, Tensor, int]]:
    """Mean, variance and steps of ``holders`` moving averages that start at 0, 1 and 0."""
    states = [(torch.zeros(C).double(), torch.ones(C).double(), 0) for _ in range(holders)]
    for i, part in enumerate(parts):
        at = i if holders > 1 else 0
        mean, variance, steps = states[at]
        steps += int(sum(x.numel() for x in part) > 0)
        rate = 1 / max(steps, 1) if momentum is None else momentum
        states[at] = (*reference.ema(mean, variance, part, rate), steps)
    return states


# A few units in the last place; of half types one rounding, which Triton's interpreter does towards
# zero for bfloat16.
_ROUNDING = 4e-3 if DEVICE.type == "cuda" else 8e-3
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: _ROUNDING, torch.float16: 5e-4}
