"""Timing alternatives that all ranks run together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.timing import Plan, Step, alternate


def alternate_together(
    sides: Mapping[str, Step], device: torch.device, plan: Plan
) -> dict[str, list[float]]:
    """Time alternatives that all ranks run together; a round lasts as long as its slowest rank.

    Returns:
        name -> seconds per step, one value a round, the same on every rank.
    """

    def agree(mine: tuple[int, int]) -> tuple[int, int]:
        # the least of both: a rank that has nothing to do in some step would choose very many
        everyone = _gather(mine)
        return min(calls for calls, _ in everyone), min(rounds for _, rounds in everyone)

    times = alternate(sides, device, plan, barrier=dist.barrier, agree=agree)
    everyone = _gather(times)
    return {
        name: [max(values) for values in zip(*(times[name] for times in everyone), strict=True)]
        for name in sides
    }


def _gather(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
