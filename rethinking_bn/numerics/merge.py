"""The variance merge: statistics of several sets of values made those of all their values.

The kernels' own is ``triton/merge_rows.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rethinking_bn.numerics.moments import Moments


def merge_moments(count: Tensor, mean: Tensor, m2: Tensor, dim: int = 0) -> Moments:
    """Pool moments over one dimension of their sets.

    With n = Σ nᵢ: mean = Σ nᵢ/n · meanᵢ and M2 = Σ (M2ᵢ + nᵢ (meanᵢ - mean)²). Empty sets
    contribute nothing whatever their mean holds; pooling only empty sets gives zeros.

    Args:
        count: (..., K, ...) number of values, K at ``dim``.
        mean, m2: the same shape with a channel dimension C appended.
        dim: the dimension (of ``count``, not negative) to pool over.

    Returns:
        Moments without that dimension.
    """
    present = (count > 0)[..., None]
    mean = torch.where(present, mean, torch.zeros_like(mean))
    m2 = torch.where(present, m2, torch.zeros_like(m2))
    total = count.sum(dim, keepdim=True)
    share = (count / total.clamp(min=1))[..., None]
    pooled_mean = (share * mean).sum(dim, keepdim=True)
    spread = count[..., None] * (mean - pooled_mean).square()
    return Moments(total.squeeze(dim), pooled_mean.squeeze(dim), (m2 + spread).sum(dim))


def mix_statistics(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Pool K means and variances as an equal-weight mixture, for statistics of unknown counts.

    Args:
        mean, variance: (K, C).

    Returns:
        (C,) mean of the means, and (C,) mean of the variances plus variance of the means.
    """
    pooled = mean.mean(0)
    return pooled, variance.mean(0) + (mean - pooled).square().mean(0)


def stack_moments(moments: list[Moments]) -> Moments:
    """Stack K one-set moments into K rows."""
    return Moments(*(torch.stack(values) for values in zip(*moments, strict=True)))
