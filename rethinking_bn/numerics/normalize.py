"""The numeric core: normalise tensors by moments pooled over a chosen set of (tensors x ranks).

Every BN variant is a choice of that set. Each tensor belongs to a *part*, whose moments the running
statistics take, and each part to a *pool*, by whose moments its tensors are normalised. Shared BN
has one pool for all levels, domain-specific BN one for each, and SyncBN pools every part over the
ranks. There are three ways:

1. a tensor that is a pool of its own, on one rank: torch's own operator;
2. a pool of several tensors or ranks: one autograd function;
3. plain operators, where a compiler, an exporter or torch.func looks on, and for a derivative of a
   derivative.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rethinking_bn.distributed import all_reduce_sum, get_world_size
from rethinking_bn.numerics.moments import (
    Moments,
    affine_normalize,
    broadcast,
    combine,
    fused_normalize,
    gradient_sums,
    is_exporting,
    is_plain,
    merge_over_ranks,
    merged,
    moments_of,
    on_device,
    statistics_dtype,
    suits_torch,
)
from rethinking_bn.numerics.running import keep_if_finite, update_running_statistics
from rethinking_bn.randomness import is_recomputing

Rows = Tensor | Sequence[Tensor] | None


class Normalized(NamedTuple):
    """L outputs, shaped and typed as the inputs, and this rank's moments if they were asked for."""

    outputs: list[Tensor]
    local: Moments | None


class _Call(NamedTuple):
    """How tensors are pooled; pool_of has the pool of each."""

    pool_of: Sequence[int]
    one_part: bool
    one_pool: bool
    eps: float
    sync: bool = False
    group: ProcessGroup | None = None


# the outputs, this rank's moments, and those of all ranks
_Pooled = tuple[list[Tensor], Moments, Moments]


def normalize(
    xs: Sequence[Tensor],
    weight: Rows,
    bias: Rows,
    *,
    parts: Sequence[int],
    pools: Sequence[int],
    eps: float,
    sync: bool = False,
    group: ProcessGroup | None = None,
    holders: Sequence[Any] = (),
    momentum: float | None = None,
    report: bool = False,
) -> Normalized:
    """Normalise each tensor by its pool's mean and biased variance, then apply its affine.

    y = weight · (x - mean) / sqrt(var + eps) + bias. The gradient is the true one, through the
    mean and the variance, over everything in the pool; the affine's gradient is this rank's sum.
    Synchronised, the forward and the backward take one collective each, however many tensors
    there are, and every rank takes both whatever it holds and whatever needs a gradient there.
    On one rank derivatives of every order are exact; over ranks there are first ones only.

    Args:
        xs: L tensors (N, C, *) of one type; any of them may be empty. Not copied.
        weight, bias: one (C,) for all tensors, or L of them, one each; None: no affine.
        parts: the part of each tensor, in 0..K-1: either all 0, or 0, 1, ..., L-1.
        pools: the pool of each of the K parts, likewise.
        eps: added to the variance.
        sync: pool over the ranks of ``group`` (None: the default group).
        holders, momentum: where the parts' running statistics are, and how far they move towards
            the pooled moments: see :func:`update_running_statistics`. None: they stay.
        report: return this rank's moments.

    Raises:
        NotImplementedError: for several ranks under torch.func or torch.export.
    """
    weights, biases = _as_list(weight), _as_list(bias)
    sync = sync and get_world_size(group) > 1
    plain = is_plain(xs[0])
    if len(xs) == 1 and not (sync or plain):
        y, local = _alone(xs[0], (weights[0], biases[0]), eps, holders, momentum, report)
        return Normalized([y], local)
    if any(pools) and not (sync or plain):
        rows = (_per_tensor(r, len(xs)) for r in (weights, biases, [[h] for h in holders] or [[]]))
        each = [
            _alone(x, affine, eps, holder, momentum, report)
            for x, *affine, holder in zip(xs, *rows, strict=True)
        ]
        moments = [m for _, m in each if m is not None]
        local = Moments(*(torch.cat(v) for v in zip(*moments, strict=True))) if report else None
        return Normalized([y for y, _ in each], local)
    if plain:
        _check_transform(sync)
    pool_of = [pools[part] for part in parts]
    call = _Call(pool_of, not any(parts), not any(pools), eps, sync, group)
    way = _in_plain_operators if plain and not sync else _together
    outputs, local, pooled = way(xs, weights, biases, call)
    if holders:
        update_running_statistics(holders, Moments(*(v.detach() for v in pooled)), momentum)
    return Normalized(outputs, local if report else None)


def _as_list(rows: Rows) -> Sequence[Any]:
    """Return one row for all tensors, or one each."""
    if isinstance(rows, Tensor):
        return (rows,) if rows.dim() == 1 else rows.unbind()
    return (None,) if rows is None else rows


def _per_tensor(rows: Sequence[Any], tensors: int) -> Sequence[Any]:
    return [rows[0]] * tensors if len(rows) == 1 else rows


def _check_transform(sync: bool) -> None:
    if torch.jit.is_tracing():
        warnings.warn(
            "mini-batch statistics in training are traced for inputs of this size only",
            torch.jit.TracerWarning,
            stacklevel=3,
        )
    exported = is_exporting()
    if sync and (exported or torch._C._are_functorch_transforms_active()):
        what = "torch.export" if exported else "torch.func"
        raise NotImplementedError(f"{what} cannot transform statistics pooled over ranks")


def _alone(
    x: Tensor, affine: Any, eps: float, holders: Any, momentum: float | None, report: bool
) -> tuple[Tensor, Moments | None]:
    """Way 1: one tensor by torch's operator, which moves the running statistics, too."""
    weight, bias = affine
    if not suits_torch(x):
        (y,), local, _ = _together([x], [weight], [bias], _Call((0,), True, True, eps))
    elif not (holders or report):
        return fused_normalize(x, weight, bias, None, None, True, 0.0, eps), None
    else:
        dtype = statistics_dtype(x.dtype)
        if momentum is not None and not report:
            # aliases, as the graph would mind later changes of the buffers themselves
            mean, variance = holders[0].running_mean.data, holders[0].running_var.data
            if mean.dtype == variance.dtype == dtype:
                old, again = torch.stack([mean, variance]), is_recomputing()
                mean, variance = old.unbind() if again else (mean, variance)
                y = fused_normalize(x, weight, bias, mean, variance, True, momentum, eps)
                if not again:
                    keep_if_finite(holders[0], old, (mean, variance))
                return y, None
        # From zeros, a step of momentum 1 leaves the batch's mean and unbiased variance.
        mean, variance = x.new_zeros(2, x.shape[1], dtype=dtype).unbind()
        y = fused_normalize(x, weight, bias, mean, variance, True, 1.0, eps)
        size = x.numel() // x.shape[1]
        local = Moments(on_device([size], mean), mean[None], variance[None] * (size - 1))
    if holders:
        update_running_statistics(holders, local, momentum)
    return y, local if report else None


def _together(
    xs: Sequence[Tensor], weights: Sequence[Any], biases: Sequence[Any], call: _Call
) -> _Pooled:
    """Way 2: by pooled moments, in one autograd function."""
    with torch.no_grad():
        local = moments_of(xs, plain=is_plain(xs[0]))
        local = merged(local) if call.one_part else local
        pooled = merge_over_ranks(local, call.group) if call.sync else local
        pool = merged(pooled) if call.one_pool else pooled
        mean, variance, count = pool.mean, pool.variance(), pool.count
    if call.sync and torch.is_grad_enabled():
        # in the graph even where nothing here needs a gradient: other ranks wait in the backward
        count = count.detach().requires_grad_()
    tensors = (mean, variance, count, *weights, *biases, *xs)
    return list(_Normalize.apply(call, len(weights), *tensors)), local, pooled


class _Normalize(torch.autograd.Function):
    """Normalisation by given pool statistics whose backward knows they came from the inputs.

    Inputs: the pools' mean and variance (P, C) and count (P,), 1 or L weights and biases, the xs.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, affines: int, *inputs: Any) -> tuple[Tensor, ...]:
        mean, variance, count, *tensors = inputs
        weights, biases = tensors[:affines], tensors[affines : 2 * affines]
        xs = tensors[2 * affines :]
        ctx.call, ctx.statistics = call, (mean, variance, count.detach())
        ctx.types = [None if t is None else t.dtype for t in (*weights, *biases)]
        ctx.save_for_backward(*weights, *xs)
        means, variances = mean.unbind(), variance.unbind()
        rows = (_per_tensor(r, len(xs)) for r in (weights, biases))
        return tuple(
            affine_normalize(x, means[p], variances[p], weight, bias, call.eps)
            for x, p, weight, bias in zip(xs, call.pool_of, *rows, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        """Return the gradients; over ranks by a collective that every rank must reach."""
        saved, affines = ctx.saved_tensors, len(ctx.types) // 2
        weights, xs = saved[:affines], saved[affines:]
        if torch.is_grad_enabled() and not ctx.call.sync:
            return (None,) * 5 + tuple(_recorded_gradients(ctx, weights, xs, dys))
        with torch.no_grad():
            gradients = _gradients(ctx, weights, xs, dys)
        if torch.is_grad_enabled():
            gradients = refuse(gradients)
        return (None,) * 5 + tuple(gradients)


def _gradients(
    ctx: Any, weights: Sequence[Any], xs: Sequence[Tensor], dys: Sequence[Tensor]
) -> list[Any]:
    """Return the gradients of the weights, the biases and the xs."""
    call: _Call = ctx.call
    mean, variance, count = ctx.statistics
    means, variances = mean.unbind(), variance.unbind()
    pairs = [
        gradient_sums(dy, x, means[p], variances[p], call.eps)
        for dy, x, p in zip(dys, xs, call.pool_of, strict=True)
    ]
    # (L, 2, C): Σ dy and Σ dy·x̂ of each tensor
    sums = torch.stack([v for pair in pairs for v in pair]).view(len(xs), 2, -1)
    own = sums.sum(0, keepdim=True) if len(weights) == 1 else sums
    a = invstd = (variance + call.eps).rsqrt()
    pooled = own if call.one_pool else sums
    if weights[0] is not None:
        rows = weights[0][None] if len(weights) == 1 else torch.stack(list(weights))
        a, pooled = invstd * rows, pooled * rows[:, None]
    if call.one_pool and len(pooled) > 1:
        pooled = pooled.sum(0, keepdim=True)
    if call.sync:
        pooled = all_reduce_sum(pooled, call.group)
    # dx = weight · invstd · dy - invstd · (Σ + x̂ · Σ') / n, which is a·dy + b·x̂ + c
    c, b = (pooled * (invstd / -count[:, None])[:, None]).unbind(1)
    each = (_per_tensor(r.unbind(), len(xs)) for r in (a, b, c, mean, variance))
    needed = ctx.needs_input_grad[-len(xs) :]
    grad_x = [
        combine(dy, x, *rows, eps=call.eps) if need else None
        for dy, x, need, *rows in zip(dys, xs, needed, *each, strict=True)
    ]
    affine = [*own[:, 1].unbind(), *own[:, 0].unbind()]
    typed = zip(affine, ctx.types, strict=True)
    return [*(None if dtype is None else g.to(dtype) for g, dtype in typed), *grad_x]


def _recorded_gradients(
    ctx: Any, weights: Sequence[Any], xs: Sequence[Tensor], dys: Sequence[Tensor]
) -> list[Any]:
    """Return the gradients as functions of everything: those of plain operators, run once more."""
    # Aliases end the graph of the inner gradients, where one input was computed from another.
    weights = [w if w is None else w.view_as(w) for w in weights]
    xs = [x.view_as(x) for x in xs]
    zero = ctx.statistics[0][0] * 0
    types = ctx.types[len(weights) :]
    biases = [t if t is None else zero.to(t, copy=True).requires_grad_() for t in types]
    outputs = _in_plain_operators(xs, weights, biases, ctx.call)[0]
    pairs = [(y, dy) for y, dy in zip(outputs, dys, strict=True) if y.requires_grad]
    ys, gradients = zip(*pairs, strict=True)
    needed = ctx.needs_input_grad[5:]
    wanted = [t for t, need in zip((*weights, *biases, *xs), needed, strict=True) if need]
    found = iter(torch.autograd.grad(ys, wanted, gradients, create_graph=True))
    return [next(found) if need else None for need in needed]


def refuse(gradients: Sequence[Any]) -> list[Any]:
    """Return gradients that raise when differentiated, whatever needs a gradient by then."""
    anchor = torch.zeros((), requires_grad=True)
    given = iter(_Refused.apply(anchor, *(g for g in gradients if g is not None)))
    return [None if g is None else next(given) for g in gradients]


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.clone() for g in gradients)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        raise RuntimeError(
            "no derivative of a derivative through statistics of ranks (sync) or MABN2d's averages"
        )


def _in_plain_operators(
    xs: Sequence[Tensor], weights: Sequence[Any], biases: Sequence[Any], call: _Call
) -> _Pooled:
    """Way 3: on one rank, in operators that can be transformed in every way."""
    local = moments_of(xs, plain=True)
    local = merged(local) if call.one_part else local
    pool = merged(local) if call.one_pool else local
    mean, invstd = pool.mean, (pool.variance() + call.eps).rsqrt()
    rows = (_per_tensor(r, len(xs)) for r in (weights, biases))
    outputs = []
    for x, p, weight, bias in zip(xs, call.pool_of, *rows, strict=True):
        scale = invstd[p] if weight is None else invstd[p] * weight
        y = (x - broadcast(mean[p], x)) * broadcast(scale, x)
        outputs.append((y if bias is None else y + broadcast(bias, x)).to(x.dtype))
    return outputs, local, local
