"""The numeric core: normalise tensors by moments pooled over a chosen set of (tensors x ranks).

Every BN variant of the package is a choice of that set. Each tensor belongs to a *part*, whose
moments the caller gets back (for its population statistics), and each part to a *pool*, by whose
moments its tensors are normalised. Shared BN puts all levels into one pool, domain-specific BN
each into its own, and SyncBN pools every part over the ranks as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rethinking_bn.distributed import get_world_size
from rethinking_bn.numerics.batch_statistics import (
    BatchStatistics,
    batch_statistics,
    pool_parts,
)
from rethinking_bn.numerics.channel_ops import are_few, broadcast
from rethinking_bn.numerics.local_moments import local_moments, plain_moments
from rethinking_bn.numerics.merge import merge_moments, stack_moments
from rethinking_bn.numerics.moments import Moments
from rethinking_bn.numerics.native import (
    moves_natively,
    normalize_and_move,
    normalize_each,
    suits_native,
)
from rethinking_bn.numerics.normalize_function import Normalize
from rethinking_bn.numerics.running import update_running_statistics
from rethinking_bn.numerics.sync import merge_over_ranks
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
    Differentiable once; under a transform of torch.func, and where torch.export makes a program of
    a model in training mode, as often as its plain operators are.

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
        NotImplementedError: for more than one rank under a transform of torch.func or torch.export.
    """
    sync = sync and get_world_size(group) > 1
    index, one_part, one_pool = _index(parts, pools)
    if takes_triton(xs, weight, bias, holders):
        from rethinking_bn.numerics.triton import batch_norm  # imports Triton

        return Normalized(
            *batch_norm.normalize(
                xs,
                weight,
                bias,
                one_part=one_part,
                pooled=one_pool,
                eps=eps,
                sync=sync,
                group=group,
                holders=holders,
                momentum=momentum,
            )
        )
    if torch.jit.is_tracing():
        warnings.warn(
            "mini-batch statistics of several tensors, or in training mode, are traced for inputs "
            "of this size only",
            torch.jit.TracerWarning,
            stacklevel=2,
        )
    weights, biases = _as_list(weight), _as_list(bias)
    exported = torch.compiler.is_exporting()
    transformed = exported or torch._C._are_functorch_transforms_active()
    needs_device = sync or transformed or torch.compiler.is_compiling()
    if len(xs) == len(holders) == 1 and not needs_device:
        if momentum is not None and moves_natively(xs[0], holders[0]):
            arguments = xs[0], weights[0], biases[0], holders[0], momentum, eps
            return Normalized([normalize_and_move(*arguments)], None)
    call = _Call(xs, weights, biases, index, one_part, one_pool, eps)
    local: BatchStatistics | Moments
    pooled: BatchStatistics | Moments
    if transformed:
        if sync:
            what = "torch.export" if exported else "torch.func"
            raise NotImplementedError(f"{what} cannot transform statistics pooled over ranks")
        outputs, local = _in_plain_operators(call)
        pooled = local
    elif needs_device:
        outputs, local, pooled = _by_moments(call, sync, group)
    else:
        outputs, local = _on_this_rank(call)
        pooled = local
    if holders:
        update_running_statistics(holders, pooled, momentum)
        return Normalized(outputs, None)
    return Normalized(outputs, local if isinstance(local, Moments) else local.moments())


class _Call(NamedTuple):
    """The arguments: a weight and a bias for all tensors or one each, the pool of each tensor,
    and whether all are one part, and one pool."""

    xs: Sequence[Tensor]
    weights: Sequence[Any]
    biases: Sequence[Any]
    pool_of: list[int]
    one_part: bool
    one_pool: bool
    eps: float


def _as_list(rows: Rows) -> Sequence[Any]:
    if rows is None:
        return [None]
    return rows.unbind() if isinstance(rows, Tensor) else rows


def _as_tensor(rows: Sequence[Any]) -> Any:
    """Return (C,) or None for all, or (L, C)."""
    return rows[0] if len(rows) == 1 else torch.stack(list(rows))


def _index(parts: Sequence[int], pools: Sequence[int]) -> tuple[list[int], bool, bool]:
    """Return each tensor's pool, and whether all parts, and all pools, are one."""
    for index in (parts, pools):
        if any(index) and list(index) != list(range(len(index))):
            raise ValueError(f"rows are merged into one or not at all, got the index {list(index)}")
    return [pools[part] for part in parts], not any(parts), not any(pools)


def _on_this_rank(call: _Call) -> tuple[list[Tensor], BatchStatistics]:
    """Normalise by statistics of this process, whose counts the host knows."""
    xs, weights, biases, index, one_part, one_pool, eps = call
    each = len(xs) == 1 or not one_pool
    if each and all(x.numel() == 0 or suits_native(x) for x in xs):
        return normalize_each(xs, weights, biases, eps)
    few = are_few(xs)
    with torch.no_grad():
        statistics = batch_statistics(xs, few)
        pool = pool_parts(statistics) if one_pool else statistics
        mean, variance = pool.values
    weight, bias = _as_tensor(weights), _as_tensor(biases)
    outputs = Normalize.apply(
        weight, bias, mean, variance, pool.counts, index, eps, few, None, False, *xs
    )
    return list(outputs), pool if one_part else statistics


def _by_moments(
    call: _Call, sync: bool, group: ProcessGroup | None
) -> tuple[list[Tensor], Moments, Moments]:
    """Normalise by statistics whose counts are on the device: other ranks', or a compiler's.

    Returns:
        The outputs, this rank's moments, and those of all ranks, one row per part.
    """
    xs, weights, biases, index, one_part, one_pool, eps = call
    with torch.no_grad():
        compiling = torch.compiler.is_compiling()
        few = are_few(xs)
        local = _each_moments(xs) if compiling else batch_statistics(xs, few).moments()
        local = _merged(local) if one_part else local
        pooled = merge_over_ranks(local, group) if sync else local
        pool = _merged(pooled) if one_pool else pooled
        count, mean, variance = pool.count, pool.mean, pool.variance()
    if sync and torch.is_grad_enabled():
        # The other ranks may wait in the backward's collective: it is part of this rank's graph
        # even if nothing here needs a gradient.
        count = count.detach().requires_grad_()
    weight, bias = _as_tensor(weights), _as_tensor(biases)
    outputs = Normalize.apply(
        weight, bias, mean, variance, count, index, eps, few, group if sync else None, sync, *xs
    )
    return list(outputs), local, pooled


def _each_moments(xs: Sequence[Tensor]) -> Moments:
    return stack_moments([local_moments(x) for x in xs])


def _in_plain_operators(call: _Call) -> tuple[list[Tensor], Moments]:
    """Normalise on one rank, in operators that torch.func can transform in every way."""
    xs, weights, biases, index, one_part, one_pool, eps = call
    local = stack_moments([plain_moments(x) for x in xs])
    local = _merged(local) if one_part else local
    pool = _merged(local) if one_pool else local
    mean, invstd = pool.mean, (pool.variance() + eps).rsqrt()
    outputs = []
    for i, (x, p) in enumerate(zip(xs, index, strict=True)):
        weight, bias = (rows[i if len(rows) > 1 else 0] for rows in (weights, biases))
        scale = invstd[p] if weight is None else invstd[p] * weight
        y = (x - broadcast(mean[p], x)) * broadcast(scale, x)
        outputs.append((y if bias is None else y + broadcast(bias, x)).to(x.dtype))
    return outputs, local


def _merged(rows: Moments) -> Moments:
    return rows if len(rows.count) == 1 else Moments(*(v[None] for v in merge_moments(*rows)))
