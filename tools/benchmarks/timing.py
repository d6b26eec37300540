"""Times of alternatives, measured in turns."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

T = TypeVar("T")
Step = Callable[[], Any]


@dataclass(frozen=True)
class Options:
    """The choices of one benchmark run.

    Attributes:
        device: where single-process comparisons run. Several processes run on CPUs, unless there
            are as many GPUs.
        quick: toy sizes and two rounds, to see that everything works; the times mean nothing.
    """

    device: torch.device = torch.device("cpu")
    quick: bool = False

    def pick(self, *, quick: T, cpu: T, cuda: T) -> T:
        """Return the value for this run's size and device."""
        if self.quick:
            return quick
        return cuda if self.device.type == "cuda" else cpu

    def device_for(self, world: int) -> torch.device:
        """Return the kind of device on which ``world`` processes can run side by side."""
        enough = self.device.type == "cuda" and torch.cuda.device_count() >= world
        return self.device if enough else torch.device("cpu")


def missing(package: str) -> str | None:
    """Return why something that needs this package is skipped, or None if it is there."""
    return None if find_spec(package) else f"needs {package}, which is not installed"


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


def alternate(
    sides: Mapping[str, Step],
    options: Options,
    seconds: float,
    *,
    together: torch.device | None = None,
    rounds: tuple[int, int] = (5, 60),
    min_sample: float = 0.01,
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Time alternatives in turns: every round runs each of them once, each round from another on.

    On the CPU it is the time of this process, which leaves out what other processes take; on a GPU
    the time of the clock on the wall, until the device is done.

    Args:
        sides: name -> a step to time.
        seconds: to spend, roughly, within the limits of ``rounds``.
        together: all ranks of the default process group run the steps together, on this device.
            The clock on the wall counts then, and a round lasts as long as its slowest rank.
        min_sample: seconds; shorter steps are repeated within a sample.
        warmup: calls of each alternative before the one that tells how long it takes, which is
            not part of the result either.

    Returns:
        name -> seconds per step, one value a round; the same on every rank.
    """
    if options.quick:
        rounds, min_sample, warmup = (2, 2), 0.0, 1
    device = together or options.device
    clock = time.process_time if device.type == "cpu" and not together else time.perf_counter

    def sample(step: Step, calls: int) -> float:
        if together:
            dist.barrier()
        synchronize(device)
        start = clock()
        for _ in range(calls):
            step()
        synchronize(device)
        return (clock() - start) / calls

    for step in sides.values():
        for _ in range(warmup):
            step()
    names = list(sides)
    once = {name: sample(sides[name], 1) for name in names}
    calls = max(1, math.ceil(min_sample / max(min(once.values()), 1e-6)))
    count = round(seconds / max(calls * sum(once.values()), 1e-6))
    count = min(max(count, rounds[0]), rounds[1])
    if together:
        # the least of both: a rank that has nothing to do in some step would choose very many
        calls, count = (min(values) for values in zip(*_gather((calls, count)), strict=True))
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for index in range(count):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(sample(sides[name], calls))
    finally:
        if collecting:
            gc.enable()
    if not together:
        return times
    everyone = _gather(times)
    return {
        name: [max(values) for values in zip(*(of_rank[name] for of_rank in everyone), strict=True)]
        for name in names
    }


def _gather(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(step: Step, device: torch.device) -> int:
    """Return how far a step raises the memory that torch has in use, at its highest."""
    step()
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results: Any = profile.profiler
    changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest
