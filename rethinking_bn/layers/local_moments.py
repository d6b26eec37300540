"""Moments of one tensor on this process, by the fastest exact way for its device and layout."""

from __future__ import annotations

import torch
from torch import Tensor

from .moments import HALF_TYPES, Moments, merge_moments, stack_moments, statistics_dtype

# The CPU's channels-last kernels add up in float32, one value after the other, which loses digits
# over many values. Moments of blocks this long are merged instead, in the same time.
_ROWS = 4096
# CUDA's kernel returns 1 / sqrt(variance + eps), and 0 for a variance and an eps of 0. This one
# tells those from an infinite variance, and is far below what float32 activations vary by.
_TINY = 1e-30
# The CPU's kernel for contiguous tensors adds up one value after the other in float64. From so
# many values, in planes (H·W) of so many, vectorised sums over blocks are 1.3 to 3 times faster.
_PLANAR, _PLANE = 2**16, 16
_BLOCK = 2**18  # values: 1 MiB of float32, which a core's cache holds


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
        if _is_planar(x):
            return _planar_moments(x, count)
        if size > _ROWS and _is_channels_last(x):
            rows = x.permute(0, 2, 3, 1).reshape(-1, channels)  # a view
            return merge_moments(
                *stack_moments([local_moments(part) for part in rows.split(_ROWS)])
            )
        # Given float32 buffers it returns float32 statistics for half types too.
        buffer = torch.zeros(channels, dtype=dtype) if dtype != x.dtype else None
        mean, variance = torch.batch_norm_update_stats(x, buffer, buffer, 0.0)
    elif x.device.type == "cuda":
        mean, variance = _cuda_mean_variance(x)
    else:
        mean, variance = _plain_mean_variance(x)
    return Moments(count, mean, variance * size)


def _is_planar(x: Tensor) -> bool:
    """Whether x has the layout for which the CPU's own kernel adds up value by value."""
    if x.dim() < 3 or x.dtype in HALF_TYPES or not x.is_contiguous():
        return False
    return x.numel() >= _PLANAR and x[0, 0].numel() >= _PLANE


def _planar_moments(x: Tensor, count: Tensor) -> Moments:
    """Moments in the corrected two-pass algorithm, block by block in the processor's cache.

    With d = x - s for a shift s near the mean: mean = s + Σd/n and M2 = Σd² - (Σd)²/n, whose
    last term takes back what rounding s left (Chan, Golub and LeVeque, 1983).
    """
    rows = x.flatten(2).flatten(0, 1)  # (N·C, H·W), a view
    shift = x.sum([0, *range(2, x.dim())]) / count
    step = max(1, _BLOCK // rows.shape[1])
    buffer = rows.new_empty(min(step, len(rows)), rows.shape[1])
    sums, squares = [], []
    for part, s in zip(rows.split(step), shift.repeat(len(x))[:, None].split(step), strict=True):
        d = torch.sub(part, s, out=buffer[: len(part)])
        sums.append(d.sum(1))
        squares.append(d.square_().sum(1))
    total = torch.cat(sums).view(x.shape[:2]).sum(0)
    square = torch.cat(squares).view(x.shape[:2]).sum(0)
    m2 = (square - total.square() / count).clamp_(min=0)
    return Moments(count, shift + total / count, m2)


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
