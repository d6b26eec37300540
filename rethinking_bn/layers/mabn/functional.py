"""The two passes of moving average batch normalisation, over tensors that share statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rethinking_bn.numerics.channel_ops import (
    affine_normalize,
    are_few,
    combine_each,
    gradient_sums,
    scale_and_shift,
)
from rethinking_bn.numerics.local_moments import mean_variance
from rethinking_bn.numerics.moments import statistics_dtype

Average = Callable[[Tensor, Tensor], Tensor]


@dataclass(eq=False)
class Statistics:
    """What one training forward normalised by; never written to afterwards.

    Attributes:
        own: (C,) s, the mean square of the input itself.
        smoothed: (C,) S, what it was normalised by.
        correction: (C,) r, constant in the backward.
        moving: () whether the backward uses the moving average of p in place of p itself.
        replays: () how often activation checkpointing has recomputed this forward.
    """

    own: Tensor
    smoothed: Tensor
    correction: Tensor
    moving: Tensor
    replays: Tensor | None = None


def mean_square(xs: Sequence[Tensor]) -> tuple[int, Tensor]:
    """Return the number of values per channel and their mean square, pooled over the tensors.

    Args:
        xs: tensors (N_l, C, H_l, W_l), some but not all of them empty.

    Returns:
        n and (C,), without gradient; half types are accumulated in float32.
    """
    if len(xs) == 1 and are_few(xs, statistics_dtype(xs[0].dtype)):
        mean, variance = mean_variance(xs[0].detach())
        return xs[0].numel() // xs[0].shape[1], torch.addcmul(variance, mean, mean)
    count, total = 0, None
    for x in xs:
        if x.numel() == 0:
            continue
        x = x.detach()
        zero = torch.zeros(x.shape[1], dtype=statistics_dtype(x.dtype), device=x.device)
        # Σ x·x is the weight gradient of an affine with input x and output gradient x.
        _, squares = gradient_sums(x, x, zero, torch.ones_like(zero), 0.0)
        count += x.numel() // x.shape[1]
        total = squares if total is None else total + squares
    if total is None:
        raise ValueError("mean_square needs a tensor that is not empty")
    return count, total / count


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

    (MABN, arXiv 2001.06838), r and S held constant. One pass over memory in the forward; one to sum
    and two to write in the backward. Differentiable once.

    Args:
        xs: tensors (N_l, C, H_l, W_l); empty ones pass through, with gradient.
        weight, bias: (C,), or both None for 1 and 0.
        average: called once per backward with p (C,) and ``statistics.moving``; returns P (C,).
    """
    return list(_MovingAverageNormalize.apply(weight, bias, statistics, eps, average, *xs))


class _MovingAverageNormalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Statistics,
        eps: float,
        average: Average,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        # The statistics travel outside the saved tensors: they keep those of the first pass when
        # activation checkpointing replaces the saved tensors by recomputed ones.
        ctx.save_for_backward(weight, *xs)
        ctx.statistics, ctx.eps, ctx.average = statistics, eps, average
        smoothed, scale = statistics.smoothed, statistics.correction
        if weight is not None:
            scale = scale * weight
        zero = torch.zeros_like(smoothed)
        if bias is not None and are_few(xs, scale.dtype):
            a = ((smoothed + eps).rsqrt_() * scale)[None]
            return scale_and_shift(xs, a, bias[None])
        return tuple(affine_normalize(x, zero, smoothed, scale, bias, eps) for x in xs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        weight, *xs = ctx.saved_tensors
        statistics: Statistics = ctx.statistics
        smoothed, r = statistics.smoothed, statistics.correction
        zero = torch.zeros_like(smoothed)
        sums = [
            gradient_sums(dy, x, zero, smoothed, ctx.eps) for dy, x in zip(grads, xs, strict=True)
        ]
        sum_dy, sum_dy_z = sums[0]
        if len(sums) > 1:
            sum_dy, sum_dy_z = (
                torch.stack(list(values)).sum(0) for values in zip(*sums, strict=True)
            )
        scale = r if weight is None else r * weight
        count = sum(x.numel() for x in xs) // max(1, smoothed.numel())
        p = scale * sum_dy_z / max(1, count)
        averaged = ctx.average(p, statistics.moving).to(smoothed.dtype)
        # dx = a·dy + b·x per channel
        inverse = (smoothed + ctx.eps).rsqrt()
        a, b = scale * inverse, -averaged * inverse.square()
        needed = ctx.needs_input_grad[-len(xs) :]
        grad_x = combine_each(grads, xs, a[None], b[None], zero[None], needed)
        grad_weight = grad_bias = None
        if weight is not None:
            grad_weight = (r * sum_dy_z).to(weight.dtype)
            grad_bias = sum_dy.to(weight.dtype)
        return grad_weight, grad_bias, None, None, None, *grad_x
