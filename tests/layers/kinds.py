"""Layers of every kind, and how each of them takes feature levels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from rethinking_bn.layers import (
    BatchNorm2d,
    BatchStatNorm2d,
    CycleBatchNorm2d,
    MultiDomainBatchNorm2d,
    SplitBatchNorm2d,
    SyncBatchNorm2d,
    row_domains,
)
from tests.reference import CHANNELS, SHAPES

ALL_EIGHT = list(itertools.product(("shared", "domain_specific"), repeat=3))
NAMES = ("train_stats", "population_stats", "affine")


def with_choices(
    choices: Sequence[str], channels: int = CHANNELS, levels: int = len(SHAPES), **options: Any
) -> MultiDomainBatchNorm2d:
    """Return a layer with train_stats, population_stats and affine as chosen."""
    chosen: Any = dict(zip(NAMES, choices, strict=True))
    return MultiDomainBatchNorm2d(channels, levels, **chosen, **options)


def affine_of(layer: Any, level: int) -> tuple[Tensor, Tensor]:
    holder = layer if layer.affine == "shared" else layer.get_submodule(str(level))
    return holder.weight, holder.bias


def kinds(channels: int = CHANNELS, levels: int = len(SHAPES)) -> dict[str, Callable[[], Any]]:
    """Return name -> how to build such a layer."""
    return {
        "BN": lambda: BatchNorm2d(channels),
        "BN, cumulative": lambda: BatchNorm2d(channels, momentum=None),
        "SyncBN": lambda: SyncBatchNorm2d(channels),
        "BatchStatBN": lambda: BatchStatNorm2d(channels),
        "cycle": lambda: CycleBatchNorm2d(channels, levels),
        **{
            "/".join(choices): lambda choices=choices: with_choices(choices, channels, levels)
            for choices in ALL_EIGHT
        },
    }


def run(layer: nn.Module, xs: list[Tensor]) -> list[Tensor]:
    """Run a layer on feature levels; rows of a split layer are of the domains 0, 1, 0, ..."""
    if isinstance(layer, SplitBatchNorm2d):
        with row_domains(layer, [i % 2 for i in range(len(xs[0]))]):
            return [layer(x) for x in xs]
    if isinstance(layer, CycleBatchNorm2d):
        with layer.cycle():
            return [layer(x) for x in xs]
    return layer(xs) if isinstance(layer, MultiDomainBatchNorm2d) else [layer(x) for x in xs]
