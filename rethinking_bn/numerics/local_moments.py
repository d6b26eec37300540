"""Moments of one tensor on this process, by the fastest exact way for its device and layout."""

from __future__ import annotations

import torch
from torch import Tensor

from rethinking_bn.numerics.blocks import (
    block_buffer,
    blocks,
    is_channels_last,
    per_plane,
    planes,
    worth_blocks,
)
from rethinking_bn.numerics.merge import merge_moments, stack_moments
from rethinking_bn.numerics.moments import Moments, statistics_dtype

# The CPU's channels-last kernels add up in float32, one value after the other, which loses digits
# over many values. Moments of blocks this long are merged instead, in the same time.
ROWS = 4096


@torch.no_grad()
def local_moments(x: Tensor) -> Moments:
    """Return this process's moments of one tensor, without gradient.

    Args:
        x: (N, C, *); half types are accumulated in float32. May be empty.

    Returns:
        Moments of one set: count (), mean (C,), m2 (C,). No host synchronisation on CUDA.
    """
    channels, dtype = x.shape[1], statistics_dtype(x.dtype)
    size = x.numel() // max(channels, 1)
    count = torch.full((), float(size), dtype=dtype, device=x.device)
    if size == 0:
        zeros = torch.zeros(channels, dtype=dtype, device=x.device)
        return Moments(count, zeros, zeros.clone())
    mean, variance = mean_variance(x)
    return Moments(count, mean, variance * size)


def mean_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance (C,) of a tensor that is not empty, within no_grad.

    Args:
        x: (N, C, *); half types are accumulated in float32.
    """
    if torch.compiler.is_compiling():  # plain operators are what a compiler can fuse
        return _plain_mean_variance(x)
    kind, buffer = x.device.type, None
    if kind == "cpu":
        dtype = statistics_dtype(x.dtype)
        if dtype == x.dtype and worth_blocks(x):
            return _block_mean_variance(x)
        size = x.numel() // x.shape[1]
        if size > ROWS and is_channels_last(x) and not x.is_contiguous():
            rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # a view
            parts = stack_moments([local_moments(part) for part in rows.split(ROWS)])
            _, mean, m2 = merge_moments(*parts)
            return mean, m2 / size
        # Given float32 buffers it returns float32 statistics for half types too.
        buffer = torch.zeros(x.shape[1], dtype=dtype) if dtype != x.dtype else None
    elif kind != "cuda":
        return _plain_mean_variance(x)
    mean, variance = torch.batch_norm_update_stats(x, buffer, buffer, 0.0)
    return mean, variance


def _block_mean_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a large contiguous tensor in the corrected two-pass algorithm, by blocks.

    With d = x - s for a shift s near the mean: mean = s + Σd/n and M2 = Σd² - (Σd)²/n, whose
    last term takes back what rounding s left (Chan, Golub and LeVeque, 1983). torch's own kernel
    adds up such tensors one value after the other in float64, which takes longer.
    """
    rows, size = planes(x), x.numel() // x.shape[1]
    shift = x.sum([0, *range(2, x.dim())]) / size
    shifts, buffer = per_plane(shift, len(x)), block_buffer(rows, x.dtype)
    sums, squares = [], []
    for block in blocks(rows):
        d = torch.sub(rows[block], shifts[block], out=buffer[: block.stop - block.start])
        sums.append(d.sum(1))
        squares.append(d.square_().sum(1))
    total = torch.cat(sums).view(x.shape[:2]).sum(0)
    square = torch.cat(squares).view(x.shape[:2]).sum(0)
    m2 = (square - total.square() / size).clamp_(min=0)
    return shift + total / size, m2 / size


def plain_moments(x: Tensor) -> Moments:
    """As :func:`local_moments` in plain, differentiable operators."""
    size = x.numel() // max(x.shape[1], 1)
    if size == 0:
        return local_moments(x)
    count = torch.full((), float(size), dtype=statistics_dtype(x.dtype), device=x.device)
    mean, variance = _plain_mean_variance(x)
    return Moments(count, mean, variance * size)


def _plain_mean_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance in plain operators, for compilers and devices without fused ones."""
    dims = [d for d in range(x.dim()) if d != 1]
    variance, mean = torch.var_mean(x.to(statistics_dtype(x.dtype)), dims, correction=0)
    return mean, variance
