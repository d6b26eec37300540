"""Moments (count, mean, M2) of channels: the one representation in which statistics are pooled.

M2 is the sum of squared deviations from the mean. Merging moments is exact over levels, iterations
and ranks alike, and unlike E[x²] - E[x]² it does not cancel when the mean is large beside the
standard deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rethinking_bn.distributed import all_gather
from rethinking_bn.numerics.channels import (
    SEQUENTIAL,
    as_rows,
    beside_rows,
    blocks,
    in_blocks,
    is_channels_last,
    is_plain,
    reduced_dims,
    statistics_dtype,
)


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


def _mean_variance(x: Tensor, plain: bool) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance (C,) of a tensor (N, C, *) that is not empty."""
    dtype = statistics_dtype(x.dtype)
    if plain:
        variance, mean = torch.var_mean(x.to(dtype), reduced_dims(x), correction=0)
        return mean, variance
    with torch.no_grad():
        if in_blocks(x) and (dtype == x.dtype or not x.is_contiguous()):
            return _block_mean_variance(x, dtype)
        if x.device.type == "cpu" and not x.is_contiguous():
            if not is_channels_last(x) or x.numel() > SEQUENTIAL * x.shape[1]:
                x = x.contiguous()
        # Given float32 buffers, the CPU's operator returns float32 statistics for half types, too.
        wide = dtype != x.dtype and x.device.type == "cpu"
        buffer = x.new_zeros(x.shape[1], dtype=dtype) if wide else None
        return torch.batch_norm_update_stats(x, buffer, buffer, 0.0)


def _block_mean_variance(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same of a large tensor in the corrected two-pass algorithm, by blocks.

    With d = x - s for a shift s near the mean: mean = s + Σd/n and M2 = Σd² - (Σd)²/n, whose
    last term takes back what rounding s left (Chan, Golub and LeVeque, 1983). Without that term
    1e3 ± 1e-3 in float32 has a variance that is off by 9e-4 of itself; with it by 1e-7.
    """
    (rows, dim), size = as_rows(x), x.numel() // x.shape[1]
    shift = x.sum(reduced_dims(x), dtype=dtype) / size
    shifts = beside_rows(shift, x, dim)
    sums, squares = [], []
    buffer = x.new_empty(next(blocks(rows)).stop, rows.shape[1], dtype=dtype)
    for block in blocks(rows):
        d = torch.sub(rows[block], shifts[block], out=buffer[: block.stop - block.start])
        sums.append(d.sum(dim))
        squares.append(d.square_().sum(dim))
    if dim == 0:
        total, square = torch.stack(sums).sum(0), torch.stack(squares).sum(0)
    else:
        total, square = (torch.cat(v).view(x.shape[:2]).sum(0) for v in (sums, squares))
    m2 = (square - total.square() / size).clamp_(min=0)
    return shift + total / size, m2 / size


def on_device(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Return numbers as a tensor of the statistics' type on ``like``'s device, without a wait."""
    if torch.compiler.is_compiling():  # sizes that a compiler keeps open are no constants
        each = [torch.full((), float(n), dtype=like.dtype, device=like.device) for n in numbers]
        return torch.stack(each)
    values = torch.tensor(numbers, dtype=like.dtype)
    return values if like.device.type == "cpu" else values.to(like.device, non_blocking=True)


def moments_of(xs: Sequence[Tensor], plain: bool) -> Moments:
    """Return this process's moments of L tensors (N, C, *), one row each; any may be empty.

    Args:
        plain: compute them with a gradient, in plain operators.
    """
    channels = xs[0].shape[1]
    counts = [x.numel() // max(channels, 1) for x in xs]
    pairs: list[tuple[Tensor, Tensor]] = []
    for x, n in zip(xs, counts, strict=True):
        zero = x.new_zeros(channels, dtype=statistics_dtype(x.dtype)) if n == 0 else None
        pairs.append(_mean_variance(x, plain) if zero is None else (zero, zero))
    values = torch.stack([mean for mean, _ in pairs] + [variance for _, variance in pairs])
    mean, variance = values.view(2, len(xs), -1).unbind()
    count = on_device(counts, values)
    return Moments(count, mean, variance * count[:, None])


def local_moments(x: Tensor) -> Moments:
    """Return this process's moments of one tensor.

    Args:
        x: (N, C, *); half types are accumulated in float32. May be empty.

    Returns:
        Moments of one set: count (), mean (C,), m2 (C,). No host synchronisation on CUDA, and no
        gradient, unless :func:`is_plain`.
    """
    return Moments(*(value[0] for value in moments_of([x], is_plain(x))))


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
    mean, m2 = mean.where(present, 0.0), m2.where(present, 0.0)
    total = count.sum(dim, keepdim=True)
    share = (count / total.clamp(min=1))[..., None]
    pooled = (share * mean).sum(dim, keepdim=True)
    spread = count[..., None] * (mean - pooled).square()
    return Moments(total.squeeze(dim), pooled.squeeze(dim), (m2 + spread).sum(dim))


def merged(rows: Moments) -> Moments:
    """Pool all rows into one row."""
    return rows if len(rows.count) == 1 else Moments(*(v[None] for v in merge_moments(*rows)))


def merge_over_ranks(rows: Moments, group: ProcessGroup | None) -> Moments:
    """Pool each of K sets with the same set of the other ranks, in one all_gather.

    Args:
        rows: counts (K,), means and M2 (K, C) of this rank; a count may be 0.
        group: None: the default group.

    Returns:
        Moments of the same shapes, bitwise the same on every rank.
    """
    packed = torch.cat([rows.count[:, None], rows.mean, rows.m2], dim=1)
    channels = rows.mean.shape[1]
    count, mean, m2 = all_gather(packed, group).split([1, channels, channels], dim=2)
    return merge_moments(count[..., 0], mean, m2)


def mix_statistics(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Pool K means and variances as an equal-weight mixture, for statistics of unknown counts.

    Args:
        mean, variance: (K, C).

    Returns:
        (C,) mean of the means, and (C,) mean of the variances plus variance of the means.
    """
    pooled = mean.mean(0)
    return pooled, variance.mean(0) + (mean - pooled).square().mean(0)


def stack_moments(moments: Sequence[Moments]) -> Moments:
    """Stack K one-set moments into K rows."""
    return Moments(*(torch.stack(values) for values in zip(*moments, strict=True)))
