"""The numeric core: normalise tensors by moments pooled over a chosen set of (tensors x ranks).

Every BN variant of the package is a choice of that set. Each tensor belongs to a *part*, whose
moments the caller gets back (for its population statistics), and each part to a *pool*, by whose
moments its tensors are normalised. Shared BN puts all levels into one pool, domain-specific BN
each into its own, and SyncBN pools every part over the ranks as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from rethinking_bn.distributed import all_gather, all_reduce_sum, get_world_size
from rethinking_bn.numerics.channel_ops import (
    affine_normalize,
    broadcast,
    combine,
    gradient_sums,
)
from rethinking_bn.numerics.moments import Moments, merge_moments, stack_moments
from rethinking_bn.numerics.running import update_running_statistics
from rethinking_bn.numerics.tensor_moments import local_moments, plain_moments
from rethinking_bn.numerics.triton.choice import takes_triton

Rows = Tensor | Sequence[Tensor] | None


class Normalized(NamedTuple):
    """What :func:`normalize` returns.

    Attributes:
        outputs: L tensors, shaped and typed as the inputs.
        local: this rank's moments, one row per part; or None where running statistics took them.
    """

    outputs: list[Tensor]
    local: Moments | None


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
) -> Normalized:
    """Normalise each tensor by its pool's mean and biased variance, then apply its affine.

    y = weight · (x - mean) / sqrt(var + eps) + bias. The gradient is the true one, through the
    mean and the variance, over everything in the pool; the affine's gradient is this rank's sum.
    Synchronised, the forward and the backward take one collective each, however many tensors
    there are, and every rank takes both whatever it holds and whatever needs a gradient there.
    Differentiable once; under a transform of torch.func as often as its plain operators are.

    Args:
        xs: L tensors (N, C, *) of one type; any of them may be empty. Not copied.
        weight, bias: one (C,) for all tensors, or L of them, one each (a sequence, or the rows of
            a tensor); None: no affine.
        parts: the part of each tensor, in 0..K-1: either all 0, or 0, 1, ..., L-1.
        pools: the pool of each of the K parts, likewise.
        eps: added to the variance.
        sync: pool over the ranks of ``group`` (None: the default group).
        holders, momentum: where the parts' running statistics are, and how far they move towards
            the pooled moments: see :func:`update_running_statistics`. None: they stay.

    Raises:
        NotImplementedError: for more than one rank under a transform of torch.func.
    """
    sync = sync and get_world_size(group) > 1
    if takes_triton(xs, weight, bias, holders):
        from rethinking_bn.numerics.triton import batch_norm  # imports Triton

        return Normalized(
            *batch_norm.normalize(
                xs,
                weight,
                bias,
                one_part=_is_one(parts),
                pooled=_is_one(pools),
                eps=eps,
                sync=sync,
                group=group,
                holders=holders,
                momentum=momentum,
            )
        )
    weight, bias = _as_rows(weight), _as_rows(bias)
    if torch._C._are_functorch_transforms_active():
        if sync:
            raise NotImplementedError("torch.func cannot transform statistics pooled over ranks")
        outputs, local = _normalize_in_plain_operators(xs, weight, bias, parts, pools, eps)
        if holders:
            update_running_statistics(holders, local, momentum)
        return Normalized(outputs, local)
    with torch.no_grad():
        per_tensor = stack_moments([local_moments(x) for x in xs])
        local = _merge_rows(per_tensor, parts)
        pooled = _merge_ranks(local, group) if sync else local
        pool = _merge_rows(pooled, pools)
        count, mean, variance = pool.count, pool.mean, pool.variance()
    if sync and torch.is_grad_enabled():
        # The other ranks may wait in the backward's collective: it is part of this rank's graph
        # even if nothing here needs a gradient.
        count = count.detach().requires_grad_()
    index = [pools[part] for part in parts]
    outputs = _Normalize.apply(
        weight, bias, mean, variance, count, index, eps, group if sync else None, sync, *xs
    )
    if holders:
        update_running_statistics(holders, pooled, momentum)
    return Normalized(list(outputs), local)


def _is_one(index: Sequence[int]) -> bool:
    """Whether an index merges everything into one, rather than nothing."""
    if all(i == 0 for i in index):
        return True
    if list(index) != list(range(len(index))):
        raise ValueError(f"rows are merged into one or not at all, got the index {list(index)}")
    return False


def _as_rows(rows: Rows) -> Tensor | None:
    if rows is None or isinstance(rows, Tensor):
        return rows
    return rows[0][None] if len(rows) == 1 else torch.stack(list(rows))


def _normalize_in_plain_operators(
    xs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    parts: Sequence[int],
    pools: Sequence[int],
    eps: float,
) -> tuple[list[Tensor], Moments]:
    """The same for one rank, in operators that torch.func can transform in every way."""
    local = _merge_rows(stack_moments([plain_moments(x) for x in xs]), parts)
    pool = _merge_rows(local, pools)
    mean, invstd = pool.mean, (pool.variance() + eps).rsqrt()
    outputs = []
    for i, x in enumerate(xs):
        p = pools[parts[i]]
        scale = invstd[p] if weight is None else invstd[p] * _row(weight, i)
        y = (x - broadcast(mean[p], x)) * broadcast(scale, x)
        outputs.append((y if bias is None else y + broadcast(_row(bias, i), x)).to(x.dtype))
    return outputs, local


def _merge_rows(rows: Moments, index: Sequence[int]) -> Moments:
    if len(index) > 1 and _is_one(index):
        return Moments(*(v[None] for v in merge_moments(*rows)))
    return rows


def _merge_ranks(rows: Moments, group: ProcessGroup | None) -> Moments:
    packed = torch.cat([rows.count[:, None], rows.mean, rows.m2], dim=1)
    gathered = all_gather(packed, group)
    channels = rows.mean.shape[1]
    return merge_moments(
        gathered[..., 0], gathered[..., 1 : 1 + channels], gathered[..., 1 + channels :]
    )


class _Normalize(torch.autograd.Function):
    """Normalisation by given pool statistics whose backward knows they came from the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        index: list[int],
        eps: float,
        group: ProcessGroup | None,
        sync: bool,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight, mean, variance, count, *xs)
        ctx.index, ctx.eps, ctx.group, ctx.sync = index, eps, group, sync
        return tuple(
            affine_normalize(x, mean[p], variance[p], _row(weight, i), _row(bias, i), eps)
            for i, (x, p) in enumerate(zip(xs, index, strict=True))
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        weight, mean, variance, count, *xs = ctx.saved_tensors
        num_pools = mean.shape[0]
        means, variances = mean.unbind(), variance.unbind()
        # per tensor: Σ dy and Σ dy·x̂, in one pass over dy and x
        pairs = [
            gradient_sums(dy, x, means[p], variances[p], ctx.eps)
            for dy, x, p in zip(grads, xs, ctx.index, strict=True)
        ]
        sums = torch.stack([value for pair in pairs for value in pair]).view(len(xs), 2, -1)
        scaled = sums if weight is None else sums * weight[:, None].to(sums.dtype)
        if num_pools == 1:
            scaled = scaled.sum(0, keepdim=True)
        if ctx.sync:
            # Reached by every rank, empty or not: the others are waiting in it.
            scaled = all_reduce_sum(scaled, ctx.group)
        scaled = scaled / count.clamp(min=1)[:, None, None]
        # dx = a·dy + b·x + c with per-channel a, b, c: one fused affine, one fused add. Each has
        # one row for all tensors or one per tensor.
        invstd = (variance + ctx.eps).rsqrt()
        a = invstd if weight is None else invstd * weight.to(invstd.dtype)
        b = -invstd.square() * scaled[:, 1]
        c = -invstd * scaled[:, 0] - b * mean
        needed = ctx.needs_input_grad[len(ctx.needs_input_grad) - len(xs) :]
        grad_x: list[Tensor | None] = [
            combine(dy, x, *(_row(row, i) for row in (a, b, c))) if need else None
            for i, (dy, x, need) in enumerate(zip(grads, xs, needed, strict=True))
        ]
        grad_weight = grad_bias = None
        if weight is not None and ctx.needs_input_grad[0]:
            grad_weight = _affine_gradient(sums[:, 1], weight)
        if weight is not None and ctx.needs_input_grad[1]:
            grad_bias = _affine_gradient(sums[:, 0], weight)
        return grad_weight, grad_bias, None, None, None, None, None, None, None, *grad_x


def _affine_gradient(per_tensor: Tensor, parameter: Tensor) -> Tensor:
    summed = per_tensor.sum(0, keepdim=True) if parameter.shape[0] == 1 else per_tensor
    return summed.to(parameter.dtype)


def _row(rows: Tensor | None, i: int) -> Any:
    return None if rows is None else rows[i if len(rows) > 1 else 0]
