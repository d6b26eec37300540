"""BatchNorm over the levels of an FPN, forward and backward, beside what people use for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import nn

from benchmarks.levels import (
    FULL_SIZES,
    HALF_SIZES,
    TOY_SIZES,
    ConcatenatedBatchNorm2d,
    Contender,
    PlainBatchNorm2d,
    check_step,
    contender,
    make_levels,
    per_level,
    row,
)
from benchmarks.result import Result
from benchmarks.timing import Options, alternate, missing, peak_bytes
from rethinking_bn.layers import BatchNorm2d, compile_norms

# (ours, other, the largest ratio that is good enough)
Pair = tuple[Contender, Contender, float | None]

# where a step takes little time, a sample is many of them
_SMALL: dict[str, Any] = {"rounds": (5, 400), "min_sample": 0.004}
_COMPILED, _PLAIN = "row 1 compiled", "a dozen plain lines compiled"
_FIVE, _CONCATENATED = "five nn.BatchNorm2d", "concatenate/split"


def run(options: Options) -> Result:
    """Compare; see the module. R50-FPN's levels at 800 x 1344 and half of it, batch 2."""
    result = Result("level-norm")
    channels = options.pick(quick=8, cpu=256, cuda=256)
    full = options.pick(quick=TOY_SIZES, cpu=FULL_SIZES, cuda=FULL_SIZES)
    half = options.pick(quick=TOY_SIZES[1:], cpu=HALF_SIZES, cuda=HALF_SIZES)
    _compare_rows(result, "full size", full, channels, options)
    _compare_rows(result, "half size", half, channels, options)
    _compare_one_tensor(result, options)
    for case, sizes, width, dtype, goal, limits in (
        ("toy sizes", TOY_SIZES, 8, torch.float32, 2.6, _SMALL),
        ("full size, bfloat16", full, channels, torch.bfloat16, None, {}),
    ):
        levels = make_levels(sizes, width, dtype=dtype, device=options.device)
        ours, five = row(1, levels), per_level(_FIVE, levels, nn.BatchNorm2d)
        concatenated = contender(_CONCATENATED, levels, ConcatenatedBatchNorm2d)
        pairs: list[Pair] = [(ours, concatenated, goal), (ours, five, None)]
        _compare(result, case, pairs, options, 8.0, equal=1, **limits)
    return result


def _compare_rows(
    result: Result,
    case: str,
    sizes: Sequence[tuple[int, int]],
    channels: int,
    options: Options,
) -> None:
    """Time all forms in turns, so that each pair shares its rounds; then compare memory."""
    levels = make_levels(sizes, channels, device=options.device)
    rows = {number: row(number, levels) for number in (1, 4, 6)}
    compiled = Contender(_COMPILED, row(1, levels).module, levels)
    compile_norms(compiled.module)
    plain = contender(_PLAIN, levels, PlainBatchNorm2d)
    plain.module.compile(dynamic=True)
    concatenated = contender(_CONCATENATED, levels, ConcatenatedBatchNorm2d)
    five = per_level(_FIVE, levels, nn.BatchNorm2d)
    for ours, other in (
        (rows[1], concatenated),
        (rows[1], compiled),
        (rows[1], plain),
        (rows[6], five),
    ):
        check_step(result, ours, other)
    at_full_size = case == "full size"
    pairs: list[Pair] = [
        (rows[1], five, 1.15),
        (rows[1], concatenated, 0.70 if at_full_size else None),
        (rows[4], five, 1.05),
        (rows[6], five, 1.05),
        (compiled, plain, 1.05),
        (compiled, concatenated, 0.55),
        (compiled, rows[1], None),
    ]
    if (reason := missing("detectron2")) is not None:
        result.skip("CycleBatchNormList", reason)
    else:
        from detectron2.layers import CycleBatchNormList

        theirs = contender(
            "CycleBatchNormList",
            levels,
            lambda c: CycleBatchNormList(len(sizes), num_features=c),
            cycle=True,
        )
        check_step(result, rows[4], theirs)
        pairs.append((rows[4], theirs, None))
    _compare(result, case, pairs, options, 20.0, equal=0)
    for side in (rows[1], compiled):
        pair = [(s.name, [float(peak_bytes(s.step, options.device))]) for s in (side, concatenated)]
        result.measure(f"{case}, peak above x", pair[0], pair[1], unit="MiB", scale=1 / 2**20)


def _compare_one_tensor(result: Result, options: Options) -> None:
    shapes = [(256, 100, 168, 1.03), (64, 32, 32, 1.15), (8, 8, 12, 1.3)]
    shapes = shapes[-1:] if options.quick else shapes
    for channels_last, (channels, height, width, goal) in product((False, True), shapes):
        levels = make_levels(
            [(height, width)], channels, channels_last=channels_last, device=options.device
        )
        pair = (
            per_level("BatchNorm2d", levels, BatchNorm2d),
            per_level("nn.BatchNorm2d", levels, nn.BatchNorm2d),
            1.3 if channels_last else goal,
        )
        case = f"(2, {channels}, {height}, {width})" + (", channels-last" if channels_last else "")
        _compare(result, case, [pair], options, 5.0, **_SMALL)


def _compare(
    result: Result,
    case: str,
    pairs: Sequence[Pair],
    options: Options,
    seconds: float,
    equal: int | None = None,
    **limits: Any,
) -> None:
    """Time all sides in turns and measure the pairs; the first ``equal`` of them must be equal."""
    for ours, other, _ in pairs[:equal]:
        check_step(result, ours, other)
    sides = {side.name: side.step for pair in pairs for side in pair[:2]}
    times = alternate(sides, options, seconds, **limits)
    for ours, other, goal in pairs:
        result.measure(
            case, (ours.name, times[ours.name]), (other.name, times[other.name]), goal=goal
        )
