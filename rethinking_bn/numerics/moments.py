"""Moments (count, mean, M2) of channels: the one representation in which statistics are pooled.

M2 is the sum of squared deviations from the mean. Merging moments is exact over levels,
iterations and ranks alike (Chan, Golub and LeVeque, 1979), and unlike E[x²] - E[x]² it does not
cancel when the mean is large beside the standard deviation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_HALF_TYPES = (torch.float16, torch.bfloat16)


class Moments(NamedTuple):
    """Moments of C channels in D independent sets of values (one row a set).

    Attributes:
        count: (D,) values per channel, as floating point.
        mean: (D, C); 0 where the count is 0.
        m2: (D, C), sum of squared deviations from the mean; 0 where the count is 0.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nothing here calls
    mean: Tensor
    m2: Tensor

    def variance(self, *, unbiased: bool = False) -> Tensor:
        """Return (D, C): m2 / count, or m2 / (count - 1); 0 where that would divide by zero."""
        divisor = self.count - 1 if unbiased else self.count
        return self.m2 / divisor.clamp(min=1)[..., None]

    def to(self, target: torch.dtype | torch.device) -> Moments:
        """Return the moments with every tensor moved by ``Tensor.to``."""
        return Moments(*(value.to(target) for value in self))  # type: ignore[call-overload]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which statistics of an input of type ``dtype`` are computed."""
    return torch.float32 if dtype in _HALF_TYPES else dtype


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
