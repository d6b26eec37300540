"""Statistics of this process's batch, whose counts the host knows: nothing asks the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rethinking_bn.numerics.local_moments import ROWS, mean_variance
from rethinking_bn.numerics.moments import Moments, statistics_dtype


class BatchStatistics(NamedTuple):
    """Mean and variance of C channels in K parts.

    Attributes:
        counts: K numbers of values per channel.
        values: (2, K, C), the means and the variances, or a pair of the two; 0 for a part without
            values.
        is_unbiased: whether the variances are those divided by count - 1 (0 for a count of 1).
    """

    counts: tuple[int, ...]
    values: Tensor | tuple[Tensor, Tensor]
    is_unbiased: bool

    def factors(self) -> list[float]:
        """Return what makes each biased variance an unbiased one."""
        return [n / max(n - 1, 1) for n in self.counts]

    def unbiased(self) -> Tensor:
        """Return the values (2, K, C) with unbiased variances."""
        values = torch.stack(self.values) if isinstance(self.values, tuple) else self.values
        if self.is_unbiased:
            return values
        rows = [[1.0] * len(self.counts), self.factors()]
        return values * on_device(rows, values)[..., None]

    def moments(self) -> Moments:
        """Return the same as moments, their counts on the device."""
        counts, (mean, variance) = self.counts, self.values
        divisors = [max(n - 1, 0) for n in counts] if self.is_unbiased else counts
        rows = on_device([counts, divisors], mean)
        return Moments(rows[0], mean, variance * rows[1, :, None])


def on_device(values: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """Return numbers as a tensor of ``like``'s type and device, without waiting for the device."""
    rows = torch.tensor(values, dtype=like.dtype)
    return rows if like.device.type == "cpu" else rows.to(like.device, non_blocking=True)


def batch_statistics(xs: Sequence[Tensor], few: bool) -> BatchStatistics:
    """Return the statistics of L tensors (N, C, *), each a part; the variances are biased.

    Half types are accumulated in float32. To be called within no_grad.

    Args:
        few: what :func:`are_few` says of the tensors.
    """
    counts = tuple([x.numel() // x.shape[1] for x in xs])
    # where calls cost more than memory, so does choosing the fastest for each tensor
    few = few and max(counts) <= ROWS
    pairs: list[tuple[Tensor, Tensor]] = []
    for x, n in zip(xs, counts, strict=True):
        if n:
            pairs.append(
                torch.batch_norm_update_stats(x, None, None, 0.0) if few else mean_variance(x)
            )
        else:
            zero = x.new_zeros(x.shape[1], dtype=statistics_dtype(x.dtype))
            pairs.append((zero, zero))
    values = torch.stack([mean for mean, _ in pairs] + [variance for _, variance in pairs])
    return BatchStatistics(counts, values.view(2, len(xs), -1), False)


def pool_parts(parts: BatchStatistics) -> BatchStatistics:
    """Pool K parts with biased variances into one.

    With shares sᵢ = nᵢ/n, means relative to that of the largest part, so that they keep their
    digits: mean = Σ sᵢ meanᵢ and variance = Σ sᵢ (varianceᵢ + (meanᵢ - mean)²).
    """
    counts, (mean, variance), _ = parts
    if len(counts) == 1:
        return parts
    largest = counts.index(max(counts))
    reference = mean[largest]
    # of fake tensors, whose mode ends, nothing is kept
    shares = _shares if type(mean) is Tensor else _shares.__wrapped__
    share = shares(counts, mean.dtype, mean.device)
    centred = mean - reference
    shift = (centred * share).sum(0, keepdim=True)
    centred.sub_(shift)
    pooled = (torch.addcmul(variance, centred, centred) * share).sum(0, keepdim=True)
    return BatchStatistics((sum(counts),), (shift.add_(reference), pooled), False)


@lru_cache(maxsize=256)
def _shares(counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (K, 1), each part's share of all values; made once for a set of image sizes."""
    with torch.inference_mode(False):
        like = torch.empty((), dtype=dtype, device=device)
        return on_device([[n / max(sum(counts), 1)] for n in counts], like)
