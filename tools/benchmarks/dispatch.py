"""Host time of a layer's step at tiny sizes, and its operators: what a GPU would wait for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.bare import floors
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
    of_row1, of_mabn, written = floors(levels, Levels(levels.xs[:1], levels.dys[:1]))
    groups = {
        "five levels": [five, concat, *ours.values(), cycle, pooled_mabn, of_row1],
        "one tensor": [*single.values(), of_mabn],
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
            beside = concat if side.name in ("row 1", "row 2", of_row1.name) else base
            pair = [(s.name, times[s.name]) for s in (side, beside)]
            result.measure(case, pair[0], pair[1], unit="µs", scale=1e6)
        counts = {name: count_operators(step) for name, step in steps.items()}
        table: list[tuple[Cell, ...]] = [
            (name, counts[name].total(), round(spread(times[name]).median * 1e6)) for name in steps
        ]
        columns = ("layer", "operators", "µs")
        result.tables.append(Table(f"{case}, one step", columns, table))
    kernels = {f"row {row}": side for row, side in ours.items()}
    kernels |= {"MABN2d, five levels": pooled_mabn, written.name: written}
    add_stubbed(result, concat, kernels, {written.name: 4}, options)
    return result
