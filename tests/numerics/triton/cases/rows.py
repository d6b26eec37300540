"""Every row of Table 5 beside float64, wherever the kernels can run.

Collected by test_kernels.py, in a process under Triton's interpreter or on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from rethinking_bn.layers import MultiDomainBatchNorm2d
from rethinking_bn.numerics.triton import plan
from tests.numerics.triton.cases.harness import (
    CASES,
    DEVICE,
    ROWS,
    SHAPES,
    TOLERANCE,
    C,
    Expected,
    averages,
    close,
    counted,
    features,
)


def check_row(
    choices: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    last: bool,
    offset: float,
    momentum: float | None,
) -> None:
    """One training step of a MultiDomainBatchNorm2d beside the reference."""
    CASES[0] += 1
    train, population, affine = choices
    layer = MultiDomainBatchNorm2d(
        C,
        len(shapes),
        train_stats=train,
        population_stats=population,
        affine=affine,
        momentum=momentum,
        device=DEVICE,
    )
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(0.5, 1.5)
    xs = features(shapes, dtype, last, offset)
    dys = [torch.randn(x.shape).to(x) for x in xs]
    weights, biases = layer._affine_rows()
    expected = Expected(xs, weights, biases)
    ys, zs = layer(xs), expected.outputs(train == "shared")
    torch.autograd.backward(ys, dys)
    torch.autograd.backward(zs, [dy.cpu().double() for dy in dys])
    tolerance = TOLERANCE[dtype]
    for x, y, z, e in zip(xs, ys, zs, expected.xs, strict=True):
        assert y.dtype == x.dtype and x.grad is not None
        assert y.stride() == x.stride() == x.grad.stride()
        close("outputs", y, z, tolerance)
        # where a level has one value, terms of 1 / sqrt(eps) cancel
        scale = 300.0 if x.numel() == C and train != "shared" else 1.0
        close("input gradients", x.grad, e.grad, tolerance, scale)
    for got, want in zip((weights, biases), expected.affine, strict=True):
        for p, e in zip(got, want, strict=True):
            zero = torch.zeros_like(e)
            close("affine gradients", p.grad, zero if e.grad is None else e.grad, 1e-6, 30.0)
    one = train == population == "shared"
    parts = [expected.xs] if one else [[x] for x in expected.xs]
    holders = layer._statistics_holders()
    states = averages(parts, len(holders), momentum)
    for holder, (mean, variance, steps) in zip(holders, states, strict=True):
        close("running means", holder.running_mean, mean.detach(), 1e-6)
        close("running variances", holder.running_var, variance.detach(), 1e-6)
        assert holder.num_batches_tracked == steps


TYPES = (torch.float32, torch.bfloat16, torch.float16)
FOLDS = {4: plan.FOLD, 6: 0}  # launches of a step -> up to how many tiles programs merge themselves


def covering() -> Iterator[Any]:
    """Every row in both layouts, and with its moments merged by 4 launches and by 6.

    In float32 with all shapes once, in a half type once; both layouts and both numbers of launches
    meet every type.
    """
    for i, choices in enumerate(ROWS):
        flipped, half = (i // 4 + i // 2 + i) % 2 == 1, TYPES[1 + (i // 2) % 2]
        launches = (4, 6) if i % 4 in (0, 3) else (6, 4)
        for last, dtype, number in zip(
            (flipped, not flipped), (torch.float32, half), launches, strict=True
        ):
            label = f"{name(choices)}-{name(last)}-{name(dtype)}-{number}"
            yield pytest.param(choices, last, dtype, number, id=label)


def name(value: object) -> str:
    if isinstance(value, bool):
        return "channels-last" if value else "contiguous"
    return "-".join(value) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def check_launches(monkeypatch: pytest.MonkeyPatch, launches: int, *case: Any) -> None:
    monkeypatch.setattr(plan, "FOLD", FOLDS[launches])
    plan.make_plan.cache_clear()
    with counted(monkeypatch) as launched:
        check_row(*case, offset=0.0, momentum=0.1)
    merges = launches == 6
    expected = ["moments", "merge", "normalize", "gradient_sums", "merge_sums", "input_gradient"]
    assert launched == [k for k in expected if merges or not k.startswith("merge")]


@pytest.mark.parametrize(("choices", "last", "dtype", "launches"), covering())
def test_every_row_layout_and_type(
    choices: tuple[str, ...],
    last: bool,
    dtype: torch.dtype,
    launches: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = SHAPES if dtype == torch.float32 else SHAPES[::2]
    check_launches(monkeypatch, launches, choices, shapes, dtype, last)


@pytest.mark.slow
@pytest.mark.parametrize("launches", FOLDS)
@pytest.mark.parametrize("dtype", TYPES, ids=name)
@pytest.mark.parametrize("last", [False, True], ids=name)
@pytest.mark.parametrize("choices", ROWS, ids=name)
def test_all_combinations(
    choices: tuple[str, ...],
    last: bool,
    dtype: torch.dtype,
    launches: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_launches(monkeypatch, launches, choices, SHAPES, dtype, last)


@pytest.mark.parametrize("last", [False, True], ids=name)
@pytest.mark.parametrize("choices", [ROWS[2], ROWS[5]], ids=name)
def test_large_mean_in_many_blocks(choices: tuple[str, ...], last: bool, small_blocks) -> None:
    """Data at 1000 ± 1 comes out as exactly as data around 0."""
    shapes = [(1, C, 5, 4), (1, C, 2, 3)]
    check_row(choices, shapes, torch.float32, last, 1000.0, None)
