"""The two passes of moving average batch normalisation, over tensors that share statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rethinking_bn.numerics.channels import (
    affine_normalize,
    combine,
    gradient_sums,
    refuse,
    statistics_dtype,
)

#: a truth that the host knows, or the device alone
Truth = bool | Tensor
Average = Callable[[Tensor, Truth], Tensor]


@dataclass(eq=False)
class Statistics:
    """What one training forward normalised by; never written to afterwards.

    Attributes:
        own: (C,) s, the mean square of the input itself.
        smoothed: (C,) S, what it was normalised by.
        correction: (C,) r, constant in the backward; a number where it is the same for all.
        moving: () whether the backward uses the moving average of p in place of p itself.
        replays: () how often activation checkpointing has recomputed this forward.
        spread: (C,) S + eps, where it is at hand.
    """

    own: Tensor
    smoothed: Tensor
    correction: Tensor | float
    moving: Truth
    replays: Tensor | None = None
    spread: Tensor | None = None


def choose(condition: Truth, value: Callable[[], Tensor], otherwise: Any) -> Any:
    """Return the one or the other; where the host knows which, the other is not computed."""
    if isinstance(condition, Tensor):
        return torch.where(condition, value(), otherwise)
    return value() if condition else otherwise


def mean_square(xs: Sequence[Tensor]) -> tuple[int, Tensor]:
    """Return the number of values per channel and their mean square, pooled over the tensors.

    Args:
        xs: tensors (N_l, C, H_l, W_l), none of them empty.

    Returns:
        n and (C,), without gradient; half types are accumulated in float32.
    """
    channels, dtype = xs[0].shape[1], statistics_dtype(xs[0].dtype)
    count = sum(x.numel() for x in xs) // channels
    zero = torch.zeros(channels, dtype=dtype, device=xs[0].device)
    # Σ x·x/n is the weight gradient of an affine with input x and output gradient x, whose σ is n
    squares = [gradient_sums(x.detach(), x.detach(), zero, zero, count * count)[1] for x in xs]
    return count, squares[0] if len(squares) == 1 else torch.stack(squares).sum(0)


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
        smoothed = statistics.smoothed
        spread = smoothed + eps if statistics.spread is None else statistics.spread
        factor = torch.ones_like(spread) if weight is None else weight.to(spread.dtype)
        scale = factor * statistics.correction
        a = spread.rsqrt().mul_(scale)
        ctx.statistics, ctx.eps, ctx.average = statistics, eps, average
        ctx.spread, ctx.scale, ctx.a = spread, scale, a
        zero = torch.zeros_like(smoothed)
        return tuple(affine_normalize(x, zero, smoothed, scale, bias, eps) for x in xs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            gradients = _MovingAverageNormalize._gradients(ctx, grads)
        return tuple(refuse(gradients) if torch.is_grad_enabled() else gradients)

    @staticmethod
    def _gradients(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
        weight, *xs = ctx.saved_tensors
        statistics: Statistics = ctx.statistics
        smoothed = statistics.smoothed
        zero = torch.zeros_like(smoothed)
        sums = [
            gradient_sums(dy, x, zero, smoothed, ctx.eps) for dy, x in zip(grads, xs, strict=True)
        ]
        sum_dy, sum_dy_z = sums[0]
        if len(sums) > 1:
            sum_dy, sum_dy_z = (
                torch.stack(list(values)).sum(0) for values in zip(*sums, strict=True)
            )
        count = sum(x.numel() for x in xs) // max(1, smoothed.numel())
        p = torch.addcmul(zero, ctx.scale, sum_dy_z, value=1 / max(1, count))
        averaged = ctx.average(p, statistics.moving).to(smoothed.dtype)
        # dx = a·dy + b·x per channel
        b = torch.addcdiv(zero, averaged, ctx.spread, value=-1)
        needed = ctx.needs_input_grad[-len(xs) :]
        grad_x = [
            combine(dy, x, ctx.a, b, zero) if need else None
            for dy, x, need in zip(grads, xs, needed, strict=True)
        ]
        grad_weight = grad_bias = None
        if weight is not None:
            grad_weight = (sum_dy_z * statistics.correction).to(weight.dtype)
            grad_bias = sum_dy.to(weight.dtype)
        return grad_weight, grad_bias, None, None, None, *grad_x
