"""How the cost of BatchNorm over levels grows with the levels and the channels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from benchmarks.contenders import (
    FPN_SIZES,
    TOY_SIZES,
    concatenated,
    make_levels,
    multi_domain,
    per_level,
)
from benchmarks.options import Options
from benchmarks.result import Result, Table
from benchmarks.timing import alternate, spread

Row = tuple[str | int | float, ...]


def add_growth(result: Result, options: Options) -> None:
    """Time the layers at several numbers of levels and of channels, and add the two tables."""
    sizes = options.pick(quick=TOY_SIZES, cpu=FPN_SIZES, cuda=FPN_SIZES)
    channels = options.pick(quick=8, cpu=64, cuda=256)
    rows = [(levels, *_times(sizes[:levels], channels, options)) for levels in (1, 2, 3, 5)]
    result.tables.append(
        _table("levels", f"ms by levels, largest first, {channels} channels", rows)
    )
    # p4 and smaller: a quarter of the size leaves time for many channels
    several = options.pick(quick=(4, 8), cpu=(16, 64, 256), cuda=(16, 64, 256, 1024))
    rows = [(channels, *_times(sizes[1:], channels, options)) for channels in several]
    result.tables.append(_table("channels", "ms by channels, all levels but the largest", rows))


def _times(
    sizes: Sequence[tuple[int, int]], channels: int, options: Options
) -> tuple[float, float, float]:
    levels = make_levels(sizes, channels, device=options.device)
    sides = (
        multi_domain("shared BN", levels),
        concatenated(levels),
        per_level("nn.BatchNorm2d per level", levels, nn.BatchNorm2d),
    )
    times = alternate({s.name: s.step for s in sides}, options.device, options.plan(1.5))
    ours, concat, five = (spread(times[side.name]).median * 1e3 for side in sides)
    return ours, concat, five


def _table(axis: str, title: str, rows: Sequence[Row]) -> Table:
    columns = (axis, "shared BN", "concatenate/split", "nn.BatchNorm2d per level")
    return Table(title, columns, list(rows), plot=True)
