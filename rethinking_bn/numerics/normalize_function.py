"""The autograd function behind :mod:`.normalize`: given pool statistics, and the true gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function
from torch.distributed import ProcessGroup

from rethinking_bn.distributed import all_reduce_sum
from rethinking_bn.numerics.batch_statistics import on_device
from rethinking_bn.numerics.channel_ops import (
    affine_normalize,
    combine_each,
    gradient_sums_of_each,
    gradient_sums_on_cuda,
    input_gradient_on_cuda,
    scale_and_shift,
)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make differentiating an autograd function's backward an error, as torch's decorator does.

    That one enters a context in every backward, which costs more than a tensor of a small layer.
    Only a backward that records a graph (``create_graph=True``) needs it.
    """
    recorded = function.once_differentiable(backward)

    @wraps(backward)
    def run(*args: Any) -> Any:
        return recorded(*args) if torch.is_grad_enabled() else backward(*args)

    return run


class Normalize(torch.autograd.Function):
    """Normalisation by given pool statistics whose backward knows they came from the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: Tensor | tuple[int, ...],
        index: list[int],
        eps: float,
        few: bool,
        group: ProcessGroup | None,
        sync: bool,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return y = weight · (x - mean) / sqrt(variance + eps) + bias of L tensors (N, C, *).

        Args:
            weight, bias: (C,) for all tensors, (L, C) for one row each, or None.
            mean, variance: (P, C), of one pool or of L.
            count: P numbers of values per channel, on all ranks; a tensor where only the device
                knows.
            index: the pool of each tensor.
            few: what :func:`are_few` says of the tensors.
            sync: the pools span the ranks of ``group``.
        """
        invstd = (variance + eps).rsqrt()
        scale = invstd if weight is None else invstd * weight
        # what is no input needs none of the checks that saved tensors take
        ctx.save_for_backward(weight, *xs)
        ctx.statistics, ctx.count = (mean, variance, invstd, scale), count
        ctx.index, ctx.eps, ctx.group, ctx.sync = index, eps, group, sync
        ctx.affine = [None if p is None else (p.dim() == 1, p.dtype) for p in (weight, bias)]
        ctx.few = few and scale.dtype == xs[0].dtype
        if ctx.few:
            shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
            return scale_and_shift(xs, scale, shift)
        means, variances = mean.unbind(), variance.unbind()
        weights, biases = _per_tensor(weight, len(xs)), _per_tensor(bias, len(xs))
        return tuple(
            affine_normalize(x, means[p], variances[p], w, b, eps)
            for x, p, w, b in zip(xs, index, weights, biases, strict=True)
        )

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        """Return the gradients; synchronised, a collective that every rank must reach."""
        weight, *xs = ctx.saved_tensors
        (mean, variance, invstd, a), count = ctx.statistics, ctx.count
        means, index = mean.unbind(), ctx.index
        on_cuda = mean.is_cuda and not torch.compiler.is_compiling()
        # per tensor: Σ dy and Σ dy·x̂, in one pass over dy and x
        if on_cuda:
            invstds = invstd.unbind()
            pairs = [
                gradient_sums_on_cuda(dy, x, means[p], invstds[p])
                for dy, x, p in zip(dys, xs, index, strict=True)
            ]
        else:
            pairs = gradient_sums_of_each(
                dys, xs, means, variance.unbind(), index, ctx.eps, ctx.few
            )
        sums = torch.stack([value for pair in pairs for value in pair]).view(len(xs), 2, -1)
        if on_cuda:
            sums[:, 1] *= invstd
        one_pool = mean.shape[0] < len(xs)
        shared = any(layout is not None and layout[0] for layout in ctx.affine)
        total = sums.sum(0, keepdim=True) if len(xs) > 1 and (one_pool or shared) else sums
        # A weight that the whole pool shares is left out of its sums, and multiplied in later.
        shares_weight = weight is None or weight.dim() == 1 or not one_pool
        pooled = total if one_pool else sums
        if not shares_weight:
            pooled = (sums * weight[:, None]).sum(0, keepdim=True)
        if ctx.sync:
            # Reached by every rank, empty or not: the others are waiting in it.
            pooled = all_reduce_sum(pooled, ctx.group)
        needed = ctx.needs_input_grad[-len(xs) :]
        grad_x: tuple[Tensor | None, ...] = (None,) * len(xs)
        if any(needed) and shares_weight and on_cuda:
            counts, weights = _as_integers(count, mean), _per_tensor(weight, len(xs))
            sum_dy, sum_dy_centred = pooled[:, 0].unbind(), (pooled[:, 1] / invstd).unbind()
            grad_x = tuple(
                input_gradient_on_cuda(
                    *(dy, x, means[p], invstds[p], w, sum_dy[p], sum_dy_centred[p]),
                    counts[p : p + 1],
                )
                if need
                else None
                for dy, x, p, w, need in zip(dys, xs, index, weights, needed, strict=True)
            )
        elif any(needed):
            # dx = a·dy + b·x + c with per-channel a, b, c: of all tensors, or a row each
            scale = (a if shares_weight else invstd) * _minus_reciprocal(count, mean)
            c, b = (pooled * scale.unsqueeze(1)).unbind(1)
            b = b * invstd
            c = torch.addcmul(c, b, mean, value=-1)
            grad_x = combine_each(dys, xs, a, b, c, needed, ctx.few)
        of_weight, of_bias = (
            _of_affine(total if layout[0] else sums, i, layout) if layout and need else None
            for layout, i, need in zip(ctx.affine, (1, 0), ctx.needs_input_grad, strict=False)
        )
        return of_weight, of_bias, None, None, None, None, None, None, None, None, *grad_x


def _of_affine(sums: Tensor, i: int, layout: tuple[bool, torch.dtype]) -> Tensor:
    """Return the i-th of the sums (K, 2, C), as the affine has it: (C,), or (K, C)."""
    is_one, dtype = layout
    gradient = sums[0].select(0, i) if is_one else sums.select(1, i)
    return gradient if gradient.dtype == dtype else gradient.to(dtype)


def _per_tensor(rows: Tensor | None, tensors: int) -> Any:
    """Return a row for each tensor, or the one there is for all."""
    return [rows] * tensors if rows is None or rows.dim() == 1 else rows.unbind()


def _minus_reciprocal(count: Tensor | tuple[int, ...], like: Tensor) -> Any:
    """Return -1 / count, a number or (P, 1)."""
    if isinstance(count, Tensor):
        return -1 / count.clamp(min=1)[:, None]
    if len(count) == 1:
        return -1 / max(count[0], 1)
    return on_device([[-1 / max(n, 1)] for n in count], like)


def _as_integers(count: Tensor | tuple[int, ...], like: Tensor) -> Tensor:
    if isinstance(count, Tensor):
        return count.to(torch.int32)
    return torch.tensor(count, dtype=torch.int32).to(like.device, non_blocking=True)
