"""The two passes of moving average batch normalisation over tensors that share statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rethinking_bn.numerics.moments import (
    affine_normalize,
    combine,
    gradient_sums,
    statistics_dtype,
)
from rethinking_bn.numerics.normalize import refuse

Average = Callable[[Tensor, Tensor], Tensor]


class Statistics(NamedTuple):
    """What one training forward normalised by. Nothing writes to it afterwards.

    Attributes:
        own: (C,) s, the mean square of the input itself.
        smoothed: (C,) S, by which the input was normalised.
        correction: (C,) r, a constant in the backward.
        moving: () whether the backward replaces p by its moving average.
    """

    own: Tensor
    smoothed: Tensor
    correction: Tensor
    moving: Tensor


def mean_square(xs: Sequence[Tensor]) -> Tensor:
    """Return (C,), the mean of x² per channel over all tensors, in float32 for half types.

    Args:
        xs: tensors (N_l, C, H_l, W_l), at least one of them not empty.
    """
    channels, dtype = xs[0].shape[1], statistics_dtype(xs[0].dtype)
    count = sum(x.numel() for x in xs) // channels
    zero = torch.zeros(channels, dtype=dtype, device=xs[0].device)
    # One pass, where square and mean are two and a copy: Σ dy·x̂ with dy = x and x̂ = x / count.
    squares = [gradient_sums(x.detach(), x.detach(), zero, zero, count * count)[1] for x in xs]
    return squares[0] if len(squares) == 1 else torch.stack(squares).sum(0)


def mabn_normalize(
    xs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics,
    eps: float,
    average: Average,
) -> list[Tensor]:
    """Return y = weight · r · x / sqrt(S + eps) + bias with MABN's backward.

    With z = x / sqrt(S + eps) and g = dy · weight · r, over all tensors together,

        p = mean(g · z);  P = average(p);  dx = (g - z · P) / sqrt(S + eps)

    (MABN, arXiv 2001.06838); r and S are constants. A second derivative is a RuntimeError.

    Args:
        xs: tensors (N_l, C, H_l, W_l); empty ones pass through, with gradient.
        weight, bias: (C,), or both None for 1 and 0.
        average: called once per backward with p (C,) and ``statistics.moving``; returns P (C,).
    """
    return list(_Normalize.apply(weight, bias, *statistics[1:], eps, average, *xs))


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        smoothed: Tensor,
        correction: Tensor,
        moving: Tensor,
        eps: float,
        average: Average,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight, *xs)
        # Activation checkpointing replaces saved tensors by recomputed ones. The statistics stay
        # those of the first pass.
        ctx.statistics, ctx.eps, ctx.average = (smoothed, correction, moving), eps, average
        zero, scale = torch.zeros_like(smoothed), _scale(weight, correction)
        return tuple(affine_normalize(x, zero, smoothed, scale, bias, eps) for x in xs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            gradients = _gradients(ctx, dys)
        return tuple(refuse(gradients) if torch.is_grad_enabled() else gradients)


def _gradients(ctx: Any, dys: Sequence[Tensor]) -> tuple[Any, ...]:
    weight, *xs = ctx.saved_tensors
    smoothed, correction, moving = ctx.statistics
    zero, one = torch.zeros_like(smoothed), torch.ones_like(smoothed)
    scale = _scale(weight, correction)
    sums = [gradient_sums(dy, x, zero, smoothed, ctx.eps) for dy, x in zip(dys, xs, strict=True)]
    sum_dy, sum_dy_z = (torch.stack(values).sum(0) for values in zip(*sums, strict=True))
    count = sum(x.numel() for x in xs) // len(smoothed)
    p = torch.addcmul(zero, scale, sum_dy_z, value=1 / max(1, count))
    averaged = ctx.average(p, moving).to(smoothed.dtype)
    # dx = a·dy + b·x per channel
    spread = smoothed + ctx.eps
    a, b = scale * spread.rsqrt(), torch.addcdiv(zero, averaged, spread, value=-1)
    needed = ctx.needs_input_grad[-len(xs) :]
    grad_x = [
        combine(dy, x, a, b, zero, zero, one, eps=0.0) if need else None
        for dy, x, need in zip(dys, xs, needed, strict=True)
    ]
    of_weight = None if weight is None else (sum_dy_z * correction).to(weight.dtype)
    of_bias = None if weight is None else sum_dy.to(weight.dtype)
    return of_weight, of_bias, None, None, None, None, None, *grad_x


def _scale(weight: Tensor | None, correction: Tensor) -> Tensor:
    return correction if weight is None else weight.to(correction.dtype) * correction
