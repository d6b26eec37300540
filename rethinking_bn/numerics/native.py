"""Tensors that are normalised each by itself, by torch's own fused operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rethinking_bn.numerics.batch_statistics import BatchStatistics
from rethinking_bn.numerics.blocks import MANY
from rethinking_bn.numerics.channel_ops import affine_normalize
from rethinking_bn.numerics.local_moments import ROWS
from rethinking_bn.numerics.moments import statistics_dtype

_FULL_TYPES = (torch.float32, torch.float64)


def suits_native(x: Tensor) -> bool:
    """Whether torch's operator normalises x exactly, and no slower than passes of our own.

    On the CPU that is where calls cost more than memory; its sums of half types are rounded for
    some strides, those of channels-last tensors lose digits over many values.
    """
    size = x.numel() // x.shape[1]
    if size == 1:  # its unbiased variance is 0 / 0
        return False
    if x.device.type == "cpu":
        exact = x.dtype in _FULL_TYPES and (size <= ROWS or x.is_contiguous())
        return exact and x.numel() < MANY
    return x.device.type == "cuda"


def moves_natively(x: Tensor, holder: Any) -> bool:
    """Whether :func:`normalize_and_move` can do all of a training step's forward."""
    if x.numel() == 0 or not suits_native(x):
        return False
    mean, variance, dtype = holder.running_mean, holder.running_var, statistics_dtype(x.dtype)
    return mean is not None and mean.dtype == dtype and variance.dtype == dtype


def normalize_and_move(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, holder: Any, momentum: float, eps: float
) -> Tensor:
    """Normalise one tensor by its own statistics, and move running statistics towards them.

    torch's operator moves copies, which become the buffers unless they are not finite.
    """
    mean, variance = holder.running_mean, holder.running_var
    moved_mean, moved_variance = torch.stack([mean, variance]).unbind()
    weight, bias = _typed(weight, mean.dtype), _typed(bias, mean.dtype)
    y = torch.native_batch_norm(x, weight, bias, moved_mean, moved_variance, True, momentum, eps)[0]
    # an input that is not finite leaves a variance that is not
    finite = moved_variance.max() < math.inf
    torch.where(finite, moved_mean, mean, out=mean)
    torch.where(finite, moved_variance, variance, out=variance)
    if holder.num_batches_tracked is not None:
        holder.num_batches_tracked.add_(finite)
    return y


def normalize_each(
    xs: Sequence[Tensor], weights: Sequence[Any], biases: Sequence[Any], eps: float
) -> tuple[list[Tensor], BatchStatistics]:
    """Normalise each tensor by its own mean and biased variance, differentiably.

    Args:
        xs: L tensors (N, C, *), each empty or one that :func:`suits_native`.
        weights, biases: one (C,) or None for all, or L of them.

    Returns:
        L tensors, and the statistics of each tensor with unbiased variances.
    """
    channels, dtype = xs[0].shape[1], statistics_dtype(xs[0].dtype)
    rows = torch.zeros(2 * len(xs), channels, dtype=dtype, device=xs[0].device)
    # From zeros, an EMA step of momentum 1 leaves the mean and the unbiased variance.
    written = rows.unbind()
    outputs, counts = [], []
    for i, x in enumerate(xs):
        weight, bias = weights[i if len(weights) > 1 else 0], biases[i if len(biases) > 1 else 0]
        counts.append(x.numel() // channels)
        mean, variance = written[i], written[len(xs) + i]
        if counts[-1] == 0:
            outputs.append(affine_normalize(x, mean, variance, weight, bias, eps))
            continue
        weight, bias = _typed(weight, dtype), _typed(bias, dtype)
        outputs.append(torch.native_batch_norm(x, weight, bias, mean, variance, True, 1.0, eps)[0])
    return outputs, BatchStatistics(tuple(counts), rows.view(2, len(xs), channels), True)


def _typed(channels: Any, dtype: torch.dtype) -> Any:
    return channels if channels is None or channels.dtype == dtype else channels.to(dtype)
