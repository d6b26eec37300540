"""BatchNorm over the levels of an FPN, forward and backward, beside what people use for it."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.contenders import (
    FPN_SIZES,
    TOY_SIZES,
    Contender,
    Levels,
    check_step,
    concatenated,
    make_levels,
    multi_domain,
    per_level,
    randomize_affine,
)
from benchmarks.equality import tolerance_of
from benchmarks.floor import floor_table
from benchmarks.growth import add_growth
from benchmarks.memory import saved_bytes
from benchmarks.options import Options, missing
from benchmarks.result import Result
from benchmarks.timing import alternate, spread
from rethinking_bn.layers import CycleBatchNorm2d

_SPECIFIC = {"train_stats": "domain_specific", "population_stats": "domain_specific"}
_VARIANTS = (
    ("float32 channels_last", torch.float32, True),
    ("bfloat16", torch.bfloat16, False),
    ("bfloat16 channels_last", torch.bfloat16, True),
)


def run(options: Options) -> Result:
    """Compare; see the module. R50-FPN's levels at 800 x 1344, batch 2, 256 channels."""
    result = Result("level-norm")
    sizes = options.pick(quick=TOY_SIZES, cpu=FPN_SIZES, cuda=FPN_SIZES)
    channels = options.pick(quick=8, cpu=256, cuda=256)
    levels = make_levels(sizes, channels, device=options.device)
    _compare(result, levels, options)
    for name, dtype, channels_last in _VARIANTS:
        variant = make_levels(
            sizes, channels, dtype=dtype, channels_last=channels_last, device=options.device
        )
        _compare_shared(result, name, variant, options, seconds=5.0)
    add_growth(result, options)
    return result


def _compare(result: Result, levels: Levels, options: Options) -> None:
    """Time all forms in turns, so that each pair shares its rounds."""
    device = options.device
    shared, concat = multi_domain("shared BN", levels), concatenated(levels)
    five = per_level("five nn.BatchNorm2d", levels, nn.BatchNorm2d)
    groups = per_level("five nn.GroupNorm", levels, lambda c: nn.GroupNorm(min(32, c), c))
    row4 = multi_domain("domain-specific BN", levels, **_SPECIFIC)
    all_specific = {**_SPECIFIC, "affine": "domain_specific"}
    row6 = multi_domain("domain-specific BN and affine", levels, **all_specific)
    tolerance = tolerance_of(torch.float32)
    check_step(result, shared, concat, tolerance)
    check_step(result, row6, five, tolerance)
    sides = [shared, concat, five, groups, row4, row6]
    cycles = _cycle_contenders(result, levels)
    for cycle in cycles:
        check_step(result, row4, cycle, tolerance)
    sides += cycles
    times = alternate({s.name: s.step for s in sides}, device, options.plan(14.0))
    for ours, other in (
        (shared, concat),
        (shared, five),
        (shared, groups),
        (row6, five),
        *((row4, cycle) for cycle in cycles[:1]),
        *((cycles[1], cycles[0]) for _ in cycles[:1]),
    ):
        pair = [(side.name, times[side.name]) for side in (ours, other)]
        result.measure("float32", pair[0], pair[1])
    _compare_saved(result, shared, concat)
    for cycle in cycles[:1]:
        _compare_saved(result, row4, cycle)
    measured = {side.name: spread(times[side.name]) for side in (shared, concat, five, row4)}
    result.tables.append(floor_table(levels.nbytes, measured, device, options.plan(1.0)))


def _compare_saved(result: Result, ours: Contender, other: Contender) -> None:
    """Compare the bytes kept for the backward, parameters aside."""
    pairs = [
        (side.name, [float(saved_bytes(side.forward, side.module.parameters()))])
        for side in (ours, other)
    ]
    result.measure("saved for backward", pairs[0], pairs[1], unit="MiB", scale=1 / 2**20)


def _cycle_contenders(result: Result, levels: Levels) -> list[Contender]:
    """Return detectron2's CycleBatchNormList and our layer for the same calls."""
    reason = missing("detectron2")
    if reason:
        result.skip("CycleBatchNormList", reason)
        return []
    from detectron2.layers import CycleBatchNormList

    x = levels.xs[0]
    theirs = CycleBatchNormList(len(levels.xs), num_features=x.shape[1]).to(x.device)
    ours = CycleBatchNorm2d(x.shape[1], len(levels.xs), device=x.device)
    randomize_affine(ours)
    return [
        Contender("CycleBatchNormList", theirs, levels, cycle=True),
        Contender("CycleBatchNorm2d", ours, levels, cycle=True),
    ]


def _compare_shared(
    result: Result, case: str, levels: Levels, options: Options, seconds: float
) -> None:
    shared, concat = multi_domain("shared BN", levels), concatenated(levels)
    five = per_level("five nn.BatchNorm2d", levels, nn.BatchNorm2d)
    check_step(result, shared, concat, tolerance_of(levels.xs[0].dtype))
    sides = (shared, concat, five)
    times = alternate({s.name: s.step for s in sides}, options.device, options.plan(seconds))
    for other in sides[1:]:
        pair = [(side.name, times[side.name]) for side in (shared, other)]
        result.measure(case, pair[0], pair[1])
