"""Batch normalisation written out in float64, independent of the package."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

SHAPES = [(6, 8), (3, 4), (2, 2), (1, 1)]
CHANNELS = 4


def levels(
    seed: int = 0,
    batch: int = 2,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    channels: int = CHANNELS,
) -> list[Tensor]:
    """Feature maps whose mean and spread differ from level to level; float64 (N, C, H, W)."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [draw(batch, channels, *size) * (1 + i) + 3 * i for i, size in enumerate(shapes)]


def values_per_channel(xs: Sequence[Tensor]) -> Tensor:
    """All values of several (N, C, H, W) tensors as (C, n)."""
    return torch.cat([x.transpose(0, 1).flatten(1) for x in xs], dim=1)


def normalize(
    xs: Sequence[Tensor], over: Sequence[Tensor], weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> list[Tensor]:
    """Normalise xs by the mean and biased variance of all values in ``over``; differentiable."""
    values = values_per_channel(over)
    mean = values.mean(1)
    variance = (values - mean[:, None]).square().mean(1)
    scale, shift = (v.view(1, -1, 1, 1) for v in (weight / torch.sqrt(variance + eps), bias))
    return [(x - mean.view(1, -1, 1, 1)) * scale + shift for x in xs]


def run_levels(
    layers: Iterable[Any], xs: Sequence[Tensor], train_stats: str, affine: str
) -> Sequence[Tensor]:
    """Run layers on all levels in training mode, the norms (those with the choices) written out."""
    for layer in layers:
        if not hasattr(layer, "train_stats"):
            xs = [layer(x) for x in xs]
            continue
        own = [layer if affine == "shared" else layer.get_submodule(str(i)) for i in range(len(xs))]
        xs = [
            normalize([x], xs if train_stats == "shared" else [x], n.weight, n.bias, layer.eps)[0]
            for x, n in zip(xs, own, strict=True)
        ]
    return xs


def ema(
    mean: Tensor, variance: Tensor, over: Sequence[Tensor], momentum: float = 0.1
) -> tuple[Tensor, Tensor]:
    """One EMA step towards the mean and unbiased variance of all values in ``over``."""
    values = values_per_channel(over).detach()
    count = values.shape[1]
    if count == 0:
        return mean, variance
    mean = (1 - momentum) * mean + momentum * values.mean(1)
    if count > 1:
        variance = (1 - momentum) * variance + momentum * values.var(1, unbiased=True)
    return mean, variance


def loss(ys: Sequence[Tensor]) -> Tensor:
    """A scalar whose gradient differs at every element."""
    return sum(((y * y.sin()).sum() + (y.pow(2) * (i + 1)).sum()) for i, y in enumerate(ys))  # type: ignore[return-value]
