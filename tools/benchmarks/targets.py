"""Largest ratio (ours / beside) that each comparison is meant to reach, by kind of device."""

from __future__ import annotations

import torch

# Keys are read off the comparisons; a device without an entry has no target there.
_TARGETS: dict[str, dict[str, float]] = {
    "shared BN / concatenate": {"cpu": 0.60, "cuda": 0.6},
    "shared BN / concatenate, kernels": {"cuda": 0.6},
    "shared BN / five BatchNorm2d": {"cpu": 1.4, "cuda": 0.8},
    "domain-specific BN / CycleBatchNormList": {"cpu": 0.45, "cuda": 0.4},
    # "less": anything below 1
    "domain-specific BN / CycleBatchNormList, saved": {"cpu": 0.99, "cuda": 0.99},
    "head norm / detectron2": {"cpu": 0.5, "cuda": 0.5},
    "collectives per layer": {"cpu": 8 / 40, "cuda": 8 / 40},
    "population / forward": {"cpu": 1.10, "cuda": 1.05},
    "averaging / torch's EMA": {"cpu": 1.1, "cuda": 1.1},
    "MABN / eager": {"cpu": 0.5, "cuda": 0.3},
    "MABN / BatchNorm2d": {"cuda": 1.25},
}
_SHUFFLE_TIME = {2: 1 / 3, 4: 1 / 6, 8: 1 / 10}


def target(key: str, device: torch.device) -> float | None:
    """Return the target of a comparison on a kind of device, None where none is set.

    Raises:
        KeyError: for an unknown comparison.
    """
    return _TARGETS[key].get(device.type)


def shuffle_targets(world: int) -> tuple[float | None, float]:
    """Return the targets of a shuffle among ``world`` ranks: of its time and of its bytes."""
    return _SHUFFLE_TIME.get(world), 1 / world


def population_target(world: int) -> float:
    """Return the target of an estimate's time on ``world`` processes, beside one."""
    return 1.2 / world
