"""What a comparison is told: where to run, and how big."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeVar

import torch

from benchmarks.timing import Plan

T = TypeVar("T")


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

    def plan(self, seconds: float) -> Plan:
        """Return how to time one set of alternatives, in about ``seconds``."""
        if self.quick:
            return Plan(seconds=0.0, min_rounds=2, max_rounds=2, warmup=1, min_sample=0.0)
        return Plan(seconds=seconds)

    def device_for(self, world: int) -> torch.device:
        """Return the kind of device on which ``world`` processes can run side by side."""
        enough = self.device.type == "cuda" and torch.cuda.device_count() >= world
        return self.device if enough else torch.device("cpu")


def missing(*packages: str) -> str | None:
    """Return why something that needs these packages is skipped, or None if all are there."""
    absent = [package for package in packages if find_spec(package) is None]
    return f"needs {' and '.join(absent)}, not installed" if absent else None
