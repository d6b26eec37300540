"""Is a difference more than chance, and how large is it? Per channel, then per layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Z_LIMIT = 5.0  # a channel counts when it is this many standard errors off (p = 6e-7)
TOGETHER_LIMIT = 4.0  # or all of a layer together, by the root mean square of their z
_FEWEST = 8  # channels that such a root mean square needs


def to_z(t: Tensor, df: float) -> Tensor:
    """Turn Student's t with ``df`` degrees of freedom into a z as improbable.

    Wallace's approximation (Annals of Mathematical Statistics 30, 1959): within 1 % for the sizes
    that matter here, far into the tail. An infinite t, of a difference without any scatter,
    becomes a large finite number.
    """
    t = t.abs().nan_to_num(0.0, posinf=1e30).clamp(max=1e30)
    z = (8 * df + 1) / (8 * df + 3) * (df * torch.log1p(t.square() / df)).sqrt()
    return z


def ratio(difference: Tensor, error: Tensor) -> Tensor:
    """Return difference / error, 0 where the difference is rounding: within 1e-6 of nothing."""
    return torch.where(difference.abs() < 1e-9, 0.0, difference / error)


class Verdict(NamedTuple):
    """How far the channels of a layer are off, those that are for certain.

    Attributes:
        effect: root mean square over ``channels`` of the sizes, 0 if there are none.
        channels: (n,) indices.
        z: the largest.
        together: whether they count as a whole, no single one being certain.
    """

    effect: float
    channels: Tensor
    z: float
    together: bool = False


def judge(size: Tensor, z: Tensor, chance: Tensor | None = None) -> Verdict:
    """Decide which channels are off by more than chance, and by how much on average.

    Args:
        size: (C,), 0 where nothing is off.
        z: (C,).
        chance: (C,) the size that chance alone gives; taken off where no single channel is
            certain. None: there is no judging together.
    """
    counts = z > Z_LIMIT
    worst = float(z.max()) if len(z) else 0.0
    if counts.any():
        return Verdict(rms(size[counts]), counts.nonzero()[:, 0], worst)
    if chance is not None and len(z) >= _FEWEST and rms(z) > TOGETHER_LIMIT:
        excess = size.square().mean() - chance.square().mean()
        return Verdict(math.sqrt(max(0.0, float(excess))), torch.arange(len(z)), worst, True)
    return Verdict(0.0, z.new_zeros(0, dtype=torch.long), worst)


def rms(x: Tensor) -> float:
    """Return the root mean square of all elements, 0 of none."""
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def off_by(mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor, eps: float) -> Tensor:
    """Return how far normalising by one pair of statistics is from doing so by another, (C,).

    sqrt(d² + (g - 1)²) with d the distance of the means in standard deviations and g the ratio of
    these, the larger of both directions: of what normalised data come out as, their mean's offset
    and their gain's.
    """
    a, b = ((v.clamp(min=0) + eps).sqrt() for v in (var, other_var))
    d = (mean - other_mean) / torch.minimum(a, b)
    gain = torch.maximum(a / b, b / a)
    return (d.square() + (gain - 1).square()).sqrt()


def f_to_z(f: Tensor, df1: float, df2: float) -> Tensor:
    """Turn a variance ratio into a one-sided z, by the normal law of its logarithm."""
    return f.clamp(min=1e-30).log() / math.sqrt(2 / max(df1, 1) + 2 / max(df2, 1))
