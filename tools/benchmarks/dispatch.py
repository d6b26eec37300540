"""Host time of a layer's step at tiny sizes, and its operators: what a GPU would wait for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.contenders import (
    TOY_SIZES,
    Contender,
    Levels,
    check_step,
    concatenated,
    make_levels,
    multi_domain,
    per_level,
)
from benchmarks.equality import tolerance_of
from benchmarks.options import Options
from benchmarks.result import Cell, Result, Table
from benchmarks.stubbed import add_stubbed
from benchmarks.timing import Plan, Step, alternate, spread
from rethinking_bn.layers import BatchNorm2d, CycleBatchNorm2d, MABN2d, SyncBatchNorm2d
from rethinking_bn.layers.multi_domain import TABLE_5
from rethinking_bn.numerics.channel_ops import combine_each, gradient_sums, scale_and_shift

_CHANNELS = 8


class OperatorCount(TorchDispatchMode):
    """Counts the operators that compute something; views and what autograd detaches are not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if not func.is_view:
            self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count_operators(step: Step) -> Counter[str]:
    """Return the operators that one call of a step dispatches, by name."""
    with OperatorCount() as count:
        step()
    return count.names


class _OneTensor(nn.Module):
    """A layer on the first of several levels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        return [self.layer(xs[0])]


class _Floor(torch.autograd.Function):
    """A layer's passes over its tensors, one autograd.Function, small operators, nothing else."""

    @staticmethod
    def forward(ctx: Any, small: int, weight: Tensor, bias: Tensor, *xs: Tensor) -> Any:
        ctx.save_for_backward(weight, *xs)
        ctx.small = small
        for x in xs:
            torch.batch_norm_update_stats(x, None, None, 0.0)
        for _ in range(small // 2):
            torch.mul(weight, bias)
        return scale_and_shift(xs, weight[None], bias[None])

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        weight, *xs = ctx.saved_tensors
        for dy, x in zip(dys, xs, strict=True):
            gradient_sums(dy, x, weight, weight, 1.0)
        for _ in range(ctx.small - ctx.small // 2):
            torch.mul(weight, weight)
        row = weight[None]
        return None, weight, weight, *combine_each(dys, xs, row, row, row, [True] * len(xs))


class _FloorLayer(nn.Module):
    def __init__(self, channels: int, small: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.small = small

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        return list(_Floor.apply(self.small, self.weight, self.bias, *xs))


def floor(name: str, levels: Levels, small: int) -> Contender:
    """Return what a layer cannot go below whose formulas need ``small`` operators of (C,)."""
    layer = _FloorLayer(levels.xs[0].shape[1], small).to(levels.xs[0].device)
    return Contender(name, layer, levels)


def rows(levels: Levels) -> dict[int, Contender]:
    """Return MultiDomainBatchNorm2d in every row of Table 5."""
    return {row: multi_domain(f"row {row}", levels, **choices) for row, choices in TABLE_5.items()}


def mabn(channels: int) -> MABN2d:
    """Return a layer that is past its warm-up, and corrects by r, after some steps."""
    return MABN2d(
        channels, simulated_batch_size=8, batch_size=2, warmup_iters=1, correction_start=0
    )


def one_tensor(levels: Levels) -> dict[str, Contender]:
    """Return the layers for one tensor, nn.BatchNorm2d first."""
    channels = levels.xs[0].shape[1]
    first = Levels(levels.xs[:1], levels.dys[:1])
    layers = {
        "nn.BatchNorm2d": nn.BatchNorm2d(channels),
        "BatchNorm2d": BatchNorm2d(channels),
        "SyncBatchNorm2d": SyncBatchNorm2d(channels),
        "MABN2d": mabn(channels),
    }
    device = levels.xs[0].device
    return {n: Contender(n, _OneTensor(layer.to(device)), first) for n, layer in layers.items()}


def run(options: Options) -> Result:
    """Compare at five toy levels, batch 2, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(options)
    finally:
        torch.set_num_threads(threads)


def _run(options: Options) -> Result:
    result = Result("dispatch")
    levels = make_levels(TOY_SIZES, _CHANNELS, device=options.device)
    device, five = options.device, per_level("five nn.BatchNorm2d", levels, nn.BatchNorm2d)
    concat, ours, single = concatenated(levels), rows(levels), one_tensor(levels)
    cycle = Contender(
        "CycleBatchNorm2d",
        CycleBatchNorm2d(_CHANNELS, len(levels.xs), device=device),
        levels,
        cycle=True,
    )
    pooled_mabn = Contender("MABN2d, five levels", mabn(_CHANNELS).to(device), levels)
    check_step(result, ours[1], concat, tolerance_of(torch.float32))
    check_step(result, ours[6], five, tolerance_of(torch.float32))
    for name in ("BatchNorm2d", "SyncBatchNorm2d"):
        check_step(result, single[name], single["nn.BatchNorm2d"], tolerance_of(torch.float32))
    # the small operators are those that MABN2d's and row 1's steps dispatch
    first = Levels(levels.xs[:1], levels.dys[:1])
    floors = [floor("floor of row 1", levels, 27), floor("floor of MABN2d", first, 27)]
    groups = {
        "five levels": [five, concat, *ours.values(), cycle, pooled_mabn, floors[0]],
        "one tensor": [*single.values(), floors[1]],
    }
    for case, sides in groups.items():
        steps = {side.name: side.step for side in sides}
        for step in steps.values():
            for _ in range(5):  # MABN2d past its warm-up
                step()
        plan = options.plan(10.0)
        if not options.quick:
            plan = Plan(seconds=10.0, max_rounds=400, warmup=5, min_sample=0.004)
        times = alternate(steps, device, plan, clock=time.process_time)
        base = sides[0]
        for side in sides[1:]:
            beside = concat if side.name in ("row 1", "row 2", "floor of row 1") else base
            pair = [(s.name, times[s.name]) for s in (side, beside)]
            result.measure(case, pair[0], pair[1], unit="µs", scale=1e6)
        counts = {name: count_operators(step) for name, step in steps.items()}
        table: list[tuple[Cell, ...]] = [
            (name, counts[name].total(), round(spread(times[name]).median * 1e6)) for name in steps
        ]
        columns = ("layer", "operators", "µs")
        result.tables.append(Table(f"{case}, one step", columns, table))
    kernels = {f"row {row}": side for row, side in ours.items()}
    add_stubbed(result, concat, {**kernels, "MABN2d, five levels": pooled_mabn}, options)
    return result
