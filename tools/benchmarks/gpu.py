"""What only a GPU can show of the kernels and of the training steps around them.

In this order: equality, waiting, kernels, wall time, block sizes, whole models, NCCL. What fails
is recorded, and the rest goes on: a GPU is not at hand every day.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.comparators.batch_norm import NormPerLevel
from benchmarks.contenders import (
    FPN_SIZES,
    TOY_SIZES,
    Contender,
    Levels,
    concatenated,
    make_levels,
    multi_domain,
    per_level,
)
from benchmarks.equality import require_equal, tolerance_of
from benchmarks.gpu_models import heads_in_training, time_models
from benchmarks.gpu_nccl import check_nccl
from benchmarks.memory import peak_bytes
from benchmarks.options import Options
from benchmarks.result import Cell, Result, Table
from benchmarks.timing import Step, alternate, kernel_time, spread, synchronizes_host
from rethinking_bn.layers import (
    BatchNorm2d,
    BatchStatNorm2d,
    CycleBatchNorm2d,
    MABN2d,
    SyncBatchNorm2d,
)
from rethinking_bn.layers.multi_domain import TABLE_5
from rethinking_bn.numerics.triton import plan

# the rows of Table 5, and the two other combinations
ROWS = {
    **{f"row {row}": choices for row, choices in TABLE_5.items()},
    "shared, affine apart": {**TABLE_5[1], "affine": "domain_specific"},
    "shared, the rest apart": {**TABLE_5[6], "train_stats": "shared"},
}
_VARIANTS = list(itertools.product((torch.float32, torch.bfloat16), (False, True)))


def run(options: Options) -> Result:
    """Run every part; what fails, differs or waits is among the failures."""
    result = Result("gpu")
    for part in (_equality, _waiting, _kernels, _wall, _block_sizes, time_models, check_nccl):
        name, start = part.__name__.strip("_").replace("_", " "), time.perf_counter()
        with result.attempt(name):
            part(result, options)
        result.notes.append(f"{name}: {time.perf_counter() - start:.0f} s")
    return result


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """Run what is inside by one implementation of the numeric core."""
    before = os.environ.get("RETHINKING_BN_KERNELS")
    os.environ["RETHINKING_BN_KERNELS"] = choice
    try:
        yield
    finally:
        if before is None:
            del os.environ["RETHINKING_BN_KERNELS"]
        else:
            os.environ["RETHINKING_BN_KERNELS"] = before


def by(choice: str, step: Callable[[], Any]) -> Step:
    """Return a step that runs by one implementation."""

    def chosen() -> Any:
        with kernels(choice):
            return step()

    return chosen


def _levels(options: Options, dtype: torch.dtype = torch.float32, last: bool = False) -> Levels:
    sizes = options.pick(quick=TOY_SIZES, cpu=FPN_SIZES, cuda=FPN_SIZES)
    channels = options.pick(quick=2, cpu=256, cuda=256)
    return make_levels(sizes, channels, dtype=dtype, channels_last=last, device=options.device)


def _row(name: str, levels: Levels) -> Contender:
    return multi_domain(name, levels, **ROWS[name])


def _equality(result: Result, options: Options) -> None:
    """Kernels, eager path and float64 on the same data, values and gradients and buffers."""
    few = ["row 1", "row 5"]
    every = few if options.quick else list(ROWS)
    cases = [(_VARIANTS[0], name) for name in every]
    if not options.quick:
        cases += itertools.product(_VARIANTS[1:], few)  # a kernel takes a second to compile
    for (dtype, last), name in cases:
        case = f"{name}, {str(dtype)[6:]} {'channels-last' if last else 'contiguous'}"
        with result.attempt(f"equality, {case}"):
            _equality_of(name, case, _levels(options, dtype, last), result)


def _equality_of(name: str, case: str, levels: Levels, result: Result) -> None:
    exact = Levels(*([t.detach().double() for t in ts] for ts in (levels.xs, levels.dys)))
    for x in exact.xs:
        x.requires_grad_()
    sides = [_row(name, levels), _row(name, levels), _row(name, exact)]
    sides[2].module.double()
    outcomes = []
    for side, choice in zip(sides, ("triton", "eager", "eager"), strict=True):
        with kernels(choice):
            outputs, grads = side.step()
        buffers = [b for b in side.module.buffers() if b.is_floating_point()]
        outcomes.append((outputs, grads, buffers))
    tolerance = tolerance_of(levels.xs[0].dtype)
    for other, what in ((1, "eager"), (2, "float64")):
        for i, kind in enumerate(("outputs", "gradients", "buffers")):
            label = f"kernels = {what}, {case}, {kind}"
            result.checks[label] = require_equal(
                label, outcomes[0][i], outcomes[other][i], tolerance
            )


def _layers(levels: Levels) -> Iterator[tuple[str, Step]]:
    """Yield a training step of every layer."""
    x, dy = levels.xs[0], levels.dys[0]
    channels, device = x.shape[1], x.device
    for name in ROWS:
        yield name, _row(name, levels).step
    cycle = CycleBatchNorm2d(channels, len(levels.xs), device=device)
    yield "CycleBatchNorm2d", Contender("", cycle, levels, cycle=True).step
    ones: dict[str, nn.Module] = {
        "BatchNorm2d": BatchNorm2d(channels, device=device),
        "BatchStatNorm2d": BatchStatNorm2d(channels, device=device),
        "SyncBatchNorm2d": SyncBatchNorm2d(channels, device=device),
        "MABN2d": _mabn(channels, device),
    }
    for name, layer in ones.items():
        yield name, _one_tensor(layer, x, dy)
    grouped = BatchNorm2d(channels, device=device)

    def by_groups() -> Any:
        with grouped.row_groups([1] * len(x)):
            return torch.autograd.grad(grouped(x), [x, *grouped.parameters()], dy)

    yield "BatchNorm2d, row groups", by_groups


def _mabn(channels: int, device: torch.device) -> MABN2d:
    return MABN2d(channels, batch_size=2, warmup_iters=1, correction_start=1, device=device)


def _one_tensor(layer: nn.Module, x: Tensor, dy: Tensor) -> Step:
    return lambda: torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)


def _waiting(result: Result, options: Options) -> None:
    """A second step of every layer and head in torch's mode that refuses to wait."""
    if options.device.type != "cuda":
        return result.skip("waiting", "needs CUDA")
    rows: list[tuple[Cell, ...]] = []
    steps = itertools.chain(_layers(_levels(options)), heads_in_training(result, options))
    for name, step in steps:
        for choice in ("triton", "eager"):
            chosen = by("auto" if choice == "triton" else choice, step)
            with result.attempt(f"waiting, {name}, {choice}"):
                chosen()
                waits = synchronizes_host(chosen)
                rows.append((name, choice, "waits" if waits else "never"))
                if waits:
                    result.failures.append(f"{name}, {choice}: the host waits in a step")
    result.tables.append(Table("Does the host wait in a step?", ("step", "kernels", "host"), rows))


def _kernels(result: Result, options: Options) -> None:
    """Launches, their time on the device and peak memory, by the profiler."""
    if options.device.type != "cuda":
        return result.skip("kernels", "needs CUDA")
    rows: list[tuple[Cell, ...]] = []
    levels = _levels(options)
    steps = {f"{name}, triton": by("auto", step) for name, step in _layers(levels)}
    for name in ("row 1", "row 4"):
        steps[f"{name}, eager"] = by("eager", _row(name, levels).step)
    steps |= {side.name: side.step for side in _beside(levels)}
    for name, step in steps.items():
        with result.attempt(f"kernels, {name}"):
            number, seconds = kernel_time(step)
            peak = peak_bytes(step, options.device) / 2**20
            rows.append((name, number, seconds * 1e3, peak))
    columns = ("step", "kernels", "their ms", "peak MiB")
    result.tables.append(Table("On the device, float32 contiguous", columns, rows))


def _beside(levels: Levels) -> list[Contender]:
    """Return what people use today."""
    x = levels.xs[0]
    cycle = NormPerLevel(nn.BatchNorm2d(x.shape[1]) for _ in levels.xs).to(x.device)
    for layer in cycle:  # as CycleBatchNormList has it: statistics apart, one affine
        layer.weight, layer.bias = cycle[0].weight, cycle[0].bias
    return [
        concatenated(levels),
        per_level("five nn.BatchNorm2d", levels, nn.BatchNorm2d),
        Contender("nn.BatchNorm2d per level, one affine", cycle, levels),
        per_level("five nn.SyncBatchNorm", levels, nn.SyncBatchNorm),
    ]


def _wall(result: Result, options: Options) -> None:
    for dtype, last in _VARIANTS[:1] if options.quick else _VARIANTS:
        case = f"{str(dtype)[6:]} {'channels-last' if last else 'contiguous'}"
        with result.attempt(f"wall, {case}"):
            _wall_of(case, _levels(options, dtype, last), result, options)


def _wall_of(case: str, levels: Levels, result: Result, options: Options) -> None:
    others = _beside(levels)
    if options.device.type != "cuda":
        others.pop()  # torch's SyncBatchNorm refuses the CPU
    steps = {side.name: side.step for side in others}
    for name in ("row 1", "row 4", "row 6"):
        steps[f"{name}, triton"] = by("triton", _row(name, levels).step)
    steps["row 1, eager"] = by("eager", _row("row 1", levels).step)
    times = alternate(steps, options.device, options.plan(4.0))
    one_affine = others[2].name
    for ours, other in (
        ("row 1, triton", "concatenate/split"),
        ("row 1, triton", "row 1, eager"),
        ("row 1, triton", "five nn.BatchNorm2d"),
        ("row 4, triton", one_affine),
        ("row 6, triton", "five nn.BatchNorm2d"),
        *(("row 1, triton", s.name) for s in others[3:]),
    ):
        result.measure(case, (ours, times[ours]), (other, times[other]))
    x, dy = levels.xs[0], levels.dys[0]
    channels = x.shape[1]
    singles: dict[str, nn.Module] = {
        "BatchNorm2d": BatchNorm2d(channels, device=x.device),
        "MABN2d": _mabn(channels, x.device),
        "nn.BatchNorm2d": nn.BatchNorm2d(channels, device=x.device),
    }
    single = {name: by("auto", _one_tensor(m, x, dy)) for name, m in singles.items()}
    times = alternate(single, options.device, options.plan(2.0))
    for name in ("BatchNorm2d", "MABN2d"):
        other = "nn.BatchNorm2d"
        result.measure(f"p3 alone, {case}", (name, times[name]), (other, times[other]))


def _block_sizes(result: Result, options: Options) -> None:
    """Row 1's step by values of a block and warps of a program; the defaults are in plan.py."""
    before = plan.BLOCK, plan.WARPS
    blocks = options.pick(quick=(256,), cpu=(4096,), cuda=(2048, 4096, 8192))
    variants = [_VARIANTS[0]] if options.quick else [_VARIANTS[0], _VARIANTS[3]]
    rows: list[tuple[Cell, ...]] = []
    try:
        for (dtype, last), block in itertools.product(variants, blocks):
            cells: list[Cell] = [f"{str(dtype)[6:]}{', channels-last' if last else ''}", block]
            for warps in (4, 8, 16):
                plan.BLOCK, plan.WARPS = block, warps
                plan.make_plan.cache_clear()
                step = by("triton", _row("row 1", _levels(options, dtype, last)).step)
                times = alternate({"": step}, options.device, options.plan(0.5))[""]
                cells.append(spread(times).median * 1e3)
            rows.append(tuple(cells))
    finally:
        plan.BLOCK, plan.WARPS = before
        plan.make_plan.cache_clear()
    columns = ("type", "values a block", "ms, 4 warps", "8", "16")
    result.tables.append(Table("Block sizes, a step of row 1", columns, rows))
