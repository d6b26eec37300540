"""What a layer costs besides wall-clock time: memory, kernels, waiting."""

from __future__ import annotations

from benchmarks.contenders import Contender
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.options import Options
from benchmarks.result import Result
from benchmarks.targets import target
from benchmarks.timing import kernel_time, synchronizes_host

_MIB = 1 / 2**20


def compare_saved(
    result: Result, ours: Contender, other: Contender, goal: float | None = None
) -> None:
    """Compare the bytes kept for the backward, parameters aside."""
    pairs = [
        (side.name, [float(saved_bytes(side.forward, side.module.parameters()))])
        for side in (ours, other)
    ]
    result.measure("saved for backward", pairs[0], pairs[1], unit="MiB", scale=_MIB, target=goal)


def compare_on_gpu(result: Result, ours: Contender, other: Contender, options: Options) -> None:
    """Compare peak memory and kernels of a step with those of a side that copies the features."""
    sides = (ours, other)
    peaks = [(side.name, [float(peak_bytes(side.step, options.device))]) for side in sides]
    one_copy_less = 1 - ours.levels.nbytes / peaks[1][1][0]
    result.measure("peak", peaks[0], peaks[1], unit="MiB", scale=_MIB, target=one_copy_less)
    kernels = [(side.name, kernel_time(side.step)) for side in sides]
    seconds = [(name, [time]) for name, (_, time) in kernels]
    goal = target("shared BN / concatenate, kernels", options.device)
    result.measure("kernel time", seconds[0], seconds[1], target=goal)
    counts = [(name, [float(count)]) for name, (count, _) in kernels]
    result.measure("kernels and copies", counts[0], counts[1], unit="", scale=1.0)
    waits = "yes" if synchronizes_host(ours.step) else "no"
    result.notes.append(f"{ours.name}: host synchronisation in a step: {waits}")
