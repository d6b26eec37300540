"""Passes over one tensor with a coefficient per channel, fused as far as torch has operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rethinking_bn.numerics.blocks import (
    MANY,
    block_buffer,
    blocks,
    is_channels_last,
    per_plane,
    planes,
    worth_blocks,
)
from rethinking_bn.numerics.moments import statistics_dtype

_native_backward = torch.ops.aten.native_batch_norm_backward.default


def broadcast(channels: Tensor, like: Tensor) -> Tensor:
    """View (C,) so that it broadcasts over the channels of (N, C, *)."""
    return channels.view(1, -1, *([1] * (like.dim() - 2)))


def affine_normalize(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Return weight · (x - mean) / sqrt(variance + eps) + bias in one pass, in x's type.

    Args:
        x: (N, C, *), may be empty.
        mean, variance, weight, bias: (C,).
    """
    dtype = statistics_dtype(x.dtype)
    mean, variance = _typed(mean, dtype), _typed(variance, dtype)
    weight, bias = _typed(weight, dtype), _typed(bias, dtype)
    # F.batch_norm's checks are of the training mode
    return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, False)


def exported_normalize(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """As :func:`affine_normalize`, in the one operator that every exporter and counter knows.

    Args:
        mean, variance: (C,), or None for those of x itself; x may be empty all the same.
    """
    return torch.batch_norm(x, weight, bias, mean, variance, mean is None, 0.0, eps, True)


def _typed(channels: Tensor | None, dtype: torch.dtype) -> Any:
    # quicker than a Tensor.to that has nothing to do
    return channels if channels is None or channels.dtype == dtype else channels.to(dtype)


def combine(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a·dy + b·x + c per channel as a new tensor in x's type: two fused passes."""
    if x.dtype != a.dtype:
        # Half types: the terms may nearly cancel, so they are added before anything is rounded.
        if worth_blocks(x) and dy.is_contiguous():
            return _combine_blocks(dy, x, a, b, c)
        out = torch.addcmul(broadcast(c, x), x, broadcast(b, x))
        return out.addcmul_(dy, broadcast(a, x)).to(x.dtype)
    zero, one = torch.zeros_like(b), torch.ones_like(b)
    return affine_normalize(x, zero, one, b, c, 0.0).addcmul_(dy, broadcast(a, dy))


def _combine_blocks(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    out = torch.empty_like(x)
    xs, dys, outs = planes(x), planes(dy), planes(out)
    a, b, c = (per_plane(channels, len(x)) for channels in (a, b, c))
    buffer = block_buffer(xs, a.dtype)
    for block in blocks(xs):
        part = torch.mul(xs[block], b[block], out=buffer[: block.stop - block.start])
        outs[block] = part.add_(c[block]).addcmul_(dys[block], a[block])
    return out


def are_few(xs: Sequence[Tensor]) -> bool:
    """Whether calls cost more than memory: small tensors of one full type on the CPU, eagerly."""
    if torch.compiler.is_compiling() or xs[0].device.type != "cpu":
        return False
    dtype = statistics_dtype(xs[0].dtype)
    return all([x.dtype == dtype and x.numel() < MANY for x in xs])


def scale_and_shift(xs: Sequence[Tensor], scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """Return scale · x + shift of L tensors in one call.

    Args:
        scale, shift: (1, C) for all, or (L, C).
    """
    if len(xs) == 1:  # a list of one costs more than its tensor
        return (torch.addcmul(_views(shift, xs)[0], xs[0], _views(scale, xs)[0]),)
    return torch._foreach_addcmul(_views(shift, xs), list(xs), _views(scale, xs))


def combine_each(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    a: Tensor,
    b: Tensor,
    c: Tensor,
    needed: Sequence[bool],
    few: bool,
) -> tuple[Tensor | None, ...]:
    """Return :func:`combine` of those of L pairs of tensors that are ``needed``, None for others.

    Args:
        a, b, c: (1, C) for all, or (L, C).
        few: what :func:`are_few` says of the tensors.
    """
    if few and all(needed):
        out = scale_and_shift(xs, b, c)
        if len(xs) == 1:
            out[0].addcmul_(dys[0], _views(a, xs)[0])
        else:
            torch._foreach_addcmul_(out, list(dys), _views(a, xs))
        return tuple(out)
    rows = [r.unbind() if r.shape[0] == len(xs) else [r[0]] * len(xs) for r in (a, b, c)]
    return tuple(
        combine(dy, x, *coefficients) if need else None
        for dy, x, need, *coefficients in zip(dys, xs, needed, *rows, strict=True)
    )


def _views(rows: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    ones = [1] * (xs[0].dim() - 2)
    if rows.shape[0] == 1:  # Tensor's len() takes ten times as long
        return [rows.view(1, -1, *ones)] * len(xs)
    return list(rows.view(rows.shape[0], 1, -1, *ones).unbind())


def input_gradient_on_cuda(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_centred: Tensor,
    count: Tensor,
) -> Tensor:
    """Return weight · invstd · (dy - Σ dy/n - x̂ · Σ dy·x̂/n) in one kernel, in x's type.

    Args:
        mean, invstd, weight: (C,).
        sum_dy, sum_dy_centred: (C,), Σ dy and Σ dy·(x - mean) of the pool.
        count: (1,) int32, n.
    """
    if x.numel() == 0:
        return torch.zeros_like(x)
    weight, dy = _typed(weight, mean.dtype), _match_memory_format(dy, x)
    return torch.batch_norm_backward_elemt(
        dy, x, mean, invstd, weight, sum_dy, sum_dy_centred, count
    )


def gradient_sums_on_cuda(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (C,) Σ dy and (C,) Σ dy·(x - mean) in one kernel."""
    if x.numel() == 0:
        zeros = torch.zeros_like(mean)
        return zeros, zeros
    dy = _match_memory_format(dy, x)
    sums = torch.batch_norm_backward_reduce(dy, x, mean, invstd, None, True, False, False)
    return sums[0], sums[1]


def gradient_sums_of_each(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    index: Sequence[int],
    eps: float,
    few: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Return :func:`gradient_sums` of L pairs of tensors, by the statistics at each one's index.

    Args:
        few: what :func:`are_few` says of them.
    """
    few = few and all([x.numel() for x in xs])
    sums = _gradient_sums_on_cpu if few else gradient_sums
    pairs = zip(dys, xs, index, strict=True)
    return [sums(dy, x, means[p], variances[p], eps) for dy, x, p in pairs]


def gradient_sums(
    dy: Tensor, x: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (C,) Σ dy and (C,) Σ dy·x̂ with x̂ = (x - mean) / sqrt(variance + eps)."""
    dtype = mean.dtype
    if x.numel() == 0:  # the fused CPU operator ends the process on an empty tensor
        zeros = torch.zeros_like(mean)
        return zeros, zeros
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        if dtype != x.dtype and not (x.is_contiguous() or is_channels_last(x)):
            x = x.contiguous()  # of other strides the kernel rounds sums to the half type
        return _gradient_sums_on_cpu(dy, x, mean, variance, eps)
    invstd = (variance + eps).rsqrt()
    if torch.compiler.is_compiling():
        return _plain_gradient_sums(dy, x, mean, invstd)
    if x.device.type == "cuda":
        sum_dy, sum_dy_centred = gradient_sums_on_cuda(dy, x, mean, invstd)
        return sum_dy.to(dtype), sum_dy_centred.to(dtype) * invstd
    return _plain_gradient_sums(dy, x, mean, invstd)


def _gradient_sums_on_cpu(
    dy: Tensor, x: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    # the mean in place of a weight tells it the type to return
    args = (mean, mean, variance, None, None, False, eps, [False, True, True])
    _, grad_weight, grad_bias = _native_backward(_match_memory_format(dy, x), x, *args)
    return grad_bias, grad_weight


def _plain_gradient_sums(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor]:
    """The same in plain operators, for compilers and devices without fused ones."""
    dims = [d for d in range(x.dim()) if d != 1]
    dy = dy.to(mean.dtype)
    normalized = (x.to(mean.dtype) - broadcast(mean, x)) * broadcast(invstd, x)
    return dy.sum(dims), (dy * normalized).sum(dims)


def _match_memory_format(dy: Tensor, x: Tensor) -> Tensor:
    if is_channels_last(x):
        return dy.contiguous(memory_format=torch.channels_last)
    return dy.contiguous()
