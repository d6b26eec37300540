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
# The CPU's channels-last kernels add up in float32, one value after the other, which loses digits
# over many values. Moments of blocks this long are merged instead, in the same time.
_ROWS = 4096
# CUDA's kernel returns 1 / sqrt(variance + eps), and 0 for a variance and an eps of 0. This one
# tells those from an infinite variance, and is far below what float32 activations vary by.
_TINY = 1e-30


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


def local_moments(x: Tensor) -> Moments:
    """Return this process's moments of one tensor, without gradient.

    Args:
        x: (N, C, *); half types are accumulated in float32. May be empty.

    Returns:
        Moments of one set: count (), mean (C,), m2 (C,). No host synchronisation on CUDA.
    """
    x = x.detach()
    channels, dtype = x.shape[1], statistics_dtype(x.dtype)
    size = x.numel() // max(channels, 1)
    count = torch.full((), float(size), dtype=dtype, device=x.device)
    if size == 0:
        zeros = torch.zeros(channels, dtype=dtype, device=x.device)
        return Moments(count, zeros, zeros.clone())
    if torch.compiler.is_compiling():  # plain operators are what a compiler can fuse
        mean, variance = _plain_mean_variance(x)
    elif x.device.type == "cpu":
        if size > _ROWS and _is_channels_last(x):
            rows = x.permute(0, 2, 3, 1).reshape(-1, channels)  # a view
            return merge_moments(
                *stack_moments([local_moments(part) for part in rows.split(_ROWS)])
            )
        # Given float32 buffers it returns float32 statistics for half types too.
        mean, variance = torch.batch_norm_update_stats(
            x, torch.zeros(channels, dtype=dtype), torch.zeros(channels, dtype=dtype), 0.0
        )
    elif x.device.type == "cuda":
        mean, variance = _cuda_mean_variance(x)
    else:
        mean, variance = _plain_mean_variance(x)
    return Moments(count, mean, variance * size)


def _is_channels_last(x: Tensor) -> bool:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return last and not x.is_contiguous()


def _cuda_mean_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance from CUDA's fused pass; a constant channel has variance 0."""
    mean, invstd = torch.batch_norm_stats(x, _TINY)
    variance = invstd.square().reciprocal()
    return mean, variance.masked_fill(variance < 2 * _TINY, 0.0)  # NaN and inf stay


def _plain_mean_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance in plain operators, for compilers and devices without fused ones."""
    dims = [d for d in range(x.dim()) if d != 1]
    variance, mean = torch.var_mean(x.to(statistics_dtype(x.dtype)), dims, correction=0)
    return mean, variance


def stack_moments(moments: list[Moments]) -> Moments:
    """Stack K one-set moments into K rows."""
    return Moments(*(torch.stack(values) for values in zip(*moments, strict=True)))
