"""Wall-clock times of alternatives, measured in turns."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Step = Callable[[], Any]
Clock = Callable[[], float]
Agree = Callable[[tuple[int, int]], tuple[int, int]]


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        seconds: to spend on one set of alternatives, roughly.
        min_rounds, max_rounds: limits of the rounds that follow from it.
        warmup: calls of each alternative before the one that tells how long it takes, which is
            not part of the result either.
        min_sample: seconds; shorter steps are repeated within a sample.
    """

    seconds: float = 8.0
    min_rounds: int = 5
    max_rounds: int = 60
    warmup: int = 1
    min_sample: float = 0.02


class Spread(NamedTuple):
    """The median of repeated measurements and their quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return the median and the quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratios(ours: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return ours / other round by round, so that a drift of the machine cancels."""
    return [a / b for a, b in zip(ours, others, strict=True) if b > 0]


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    sides: Mapping[str, Step],
    device: torch.device,
    plan: Plan,
    *,
    barrier: Step | None = None,
    agree: Agree | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Time alternatives in turns: every round runs each of them once, each round from another on.

    Args:
        sides: name -> a step to time.
        barrier: called before every sample, where several processes take the samples together.
        agree: takes (steps per sample, rounds) as this process would choose them and returns what
            all processes use.
        clock: tells seconds; ``time.process_time`` leaves out what other processes take.

    Returns:
        name -> seconds per step, one value a round.
    """
    for step in sides.values():
        for _ in range(plan.warmup):
            step()
    names = list(sides)
    once = {name: _sample(sides[name], 1, device, barrier, clock) for name in names}
    calls = max(1, math.ceil(plan.min_sample / max(min(once.values()), 1e-6)))
    per_round = calls * sum(once.values())
    rounds = round(plan.seconds / max(per_round, 1e-6))
    rounds = min(max(rounds, plan.min_rounds), plan.max_rounds)
    if agree is not None:
        calls, rounds = agree((calls, rounds))
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(_sample(sides[name], calls, device, barrier, clock))
    finally:
        if collecting:
            gc.enable()
    return times


def _sample(
    step: Step, calls: int, device: torch.device, barrier: Step | None, clock: Clock
) -> float:
    if barrier is not None:
        barrier()
    synchronize(device)
    start = clock()
    for _ in range(calls):
        step()
    synchronize(device)
    return (clock() - start) / calls


def kernel_time(step: Step) -> tuple[int, float]:
    """Return how many kernels (and copies) a step launches on the GPU, and their seconds in sum."""
    step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [
        event
        for event in profile.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return len(kernels), sum(event.time_range.elapsed_us() for event in kernels) * 1e-6


def synchronizes_host(step: Step) -> bool:
    """Return whether a step on the GPU makes the host wait for it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False
