"""Normalisation of several tensors in four to six launches a step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rethinking_bn.distributed import all_gather, all_reduce_sum
from rethinking_bn.numerics.moments import Moments
from rethinking_bn.numerics.normalize_function import differentiable_once
from rethinking_bn.numerics.triton import backward, forward
from rethinking_bn.numerics.triton.choice import layout
from rethinking_bn.numerics.triton.plan import Plan, make_plan

Tensors = tuple[Tensor, ...]

STEP = 32  # rows merged at a time
COLUMNS = 32  # channels of a program that merges and does nothing else
_HERE = nullcontext()


class _Call(NamedTuple):
    """What a forward and its backward know besides tensors.

    Attributes:
        weights: how many there are.
        biases: these; the backward needs nothing of them but what their gradients look like.
        pooled: whether all groups are normalised by one mean and variance.
        one_part: whether all groups' moments are one row for the ranks and the moving averages.
        report: gets the parts' moments on this rank.
    """

    plan: Plan
    format: torch.memory_format
    weights: int
    biases: Sequence[Tensor]
    pooled: bool
    one_part: bool
    eps: float
    sync: bool
    group: ProcessGroup | None
    holders: Sequence[Any]
    momentum: float | None
    report: list[Tensor] | None


def normalize(
    xs: Sequence[Tensor],
    weights: Tensor | Sequence[Tensor] | None,
    biases: Tensor | Sequence[Tensor] | None,
    *,
    one_part: bool,
    pooled: bool,
    eps: float,
    sync: bool = False,
    group: ProcessGroup | None = None,
    holders: Sequence[Any] = (),
    momentum: float | None = None,
    row_groups: tuple[int, ...] | None = None,
) -> tuple[list[Tensor], Moments | None]:
    """Normalise as :func:`rethinking_bn.numerics.normalize.normalize` does.

    Args:
        xs: tensors for which :func:`choice.takes_triton` is true.
        weights, biases: (C,) each, one or one per tensor.
        one_part: whether the tensors are one part, or one each.
        pooled: whether the parts are one pool, or one each.
        holders: as there; without them moments are returned.
        row_groups: rows of the groups of the only tensor, which are parts and pools of their own.

    Returns:
        outputs; this rank's moments, a row for each part, or None.
    """
    x, memory_format = xs[0], layout(xs)
    assert memory_format is not None
    last = memory_format is torch.channels_last
    shapes = tuple([x.shape for x in xs])
    call = _Call(
        plan=make_plan(shapes, row_groups, last, x.element_size(), x.device),
        format=memory_format,
        weights=0 if weights is None else len(weights),
        biases=() if biases is None else [*biases],
        pooled=pooled or one_part,
        one_part=one_part,
        eps=eps,
        sync=sync,
        group=group,
        holders=holders,
        momentum=momentum,
        report=None if holders else [],
    )
    affine = (*(() if weights is None else weights), *call.biases)
    anchor = None
    if sync and torch.is_grad_enabled():
        # The other ranks may wait in the backward's collective: it is part of this rank's graph
        # even if nothing here needs a gradient.
        anchor = x.new_empty((), dtype=torch.float32).requires_grad_()
    ys = list(_Normalize.apply(call, anchor, *affine, *xs))
    if call.report is None:
        return ys, None
    (rows,) = call.report
    return ys, Moments(rows[:, 0, 0], rows[:, 1], rows[:, 3])


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Tensor | None, *tensors: Tensor) -> Tensors:
        plan, of_each = call.plan, max(call.weights, len(call.biases))
        first_x = call.weights + len(call.biases)
        weights = tensors[: call.weights] or None
        biases, xs = tensors[call.weights : first_x] or None, tensors[first_x:]
        ys = tuple([torch.empty_like(x) for x in xs])
        parts = 1 if call.one_part else plan.groups
        pools = 1 if call.pooled else plan.groups
        stats = xs[0].new_empty((4, pools, plan.channels), dtype=torch.float32)
        rows, number = stats.new_empty((plan.tiles, 4, plan.channels)), plan.tiles
        folded = plan.folded and not call.sync and call.report is None
        buffers = _buffers(call.holders)
        with on_device(stats.device):
            if plan.tiles:
                forward.moments[plan.grid](
                    xs, plan.table, rows, plan.channels, L=len(xs), **plan.block
                )
            if not folded:
                rows, number = _merge(call, rows, parts), parts
                if call.report is not None:
                    call.report.append(rows)
                if call.sync:
                    rows = all_gather(rows, call.group)
                    number = parts * len(rows)
            forward.normalize[plan.grid](
                xs, ys, plan.table, plan.listed, rows, number, parts, weights, biases, stats,
                *buffers, call.momentum, call.eps, plan.channels, L=len(xs),
                A=of_each, H=len(call.holders), POOLED=call.pooled,
                ALL=call.one_part, FOLDED=folded, STEP=STEP, **plan.block,
            )  # fmt: skip
        if call.holders:
            mark_written([b for kind in buffers for b in kind or ()])
        # what is no input needs none of the checks that saved tensors take
        ctx.call, ctx.stats = call, stats
        ctx.save_for_backward(*(weights or ()), *xs)
        return ys

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        plan, stats, saved = call.plan, ctx.stats, ctx.saved_tensors
        affine = call.weights + len(call.biases)
        weights, xs = saved[: call.weights] or None, saved[call.weights :]
        dys = tuple([dy.contiguous(memory_format=call.format) for dy in grads])
        needed = ctx.needs_input_grad[2:]
        wants_dx = any(needed[affine:])
        grad_weights = grad_biases = None
        if any(needed[: call.weights]):
            grad_weights = tuple([torch.empty_like(w) for w in weights or ()])
        if any(needed[call.weights : affine]):
            grad_biases = tuple([torch.empty_like(b) for b in call.biases])
        pools, number = stats.shape[1], plan.tiles
        folded = plan.folded and not call.sync and wants_dx
        rows = stats.new_empty((number, 2, plan.channels))
        dxs: tuple[Tensor, ...] | None = None
        of_each = max(call.weights, len(call.biases), 1)
        choices = {"A": of_each, "POOLED": call.pooled, "STEP": STEP}
        with on_device(stats.device):
            if number:
                backward.gradient_sums[plan.grid](
                    dys, xs, plan.table, stats, pools, rows, plan.channels, L=len(xs),
                    POOLED=call.pooled, **plan.block,
                )  # fmt: skip
            if not folded:
                sums = stats.new_empty((2, pools, plan.channels))
                backward.merge_sums[pools, -(-plan.channels // COLUMNS)](
                    rows, plan.table, plan.listed, number, plan.groups, weights, grad_weights,
                    grad_biases, sums, pools, plan.channels, COLUMNS=COLUMNS, num_warps=4,
                    **choices,
                )  # fmt: skip
                # Reached by every rank, empty or not: the others are waiting in it.
                rows = all_reduce_sum(sums, call.group) if call.sync else sums
            if wants_dx:
                dxs = tuple([torch.empty_like(x) for x in xs])
                backward.input_gradient[plan.grid](
                    dys, xs, dxs, plan.table, plan.listed, rows, number, plan.groups, stats,
                    pools, weights, grad_weights, grad_biases, plan.channels, L=len(xs),
                    FOLDED=folded, **choices, **plan.block,
                )  # fmt: skip
        return (
            None,
            None,
            *(grad_weights or [None] * call.weights),
            *(grad_biases or [None] * len(call.biases)),
            *(dxs or [None] * len(xs)),
        )


def _merge(call: _Call, rows: Tensor, parts: int) -> Tensor:
    """Return (K, 4, C), the tiles' rows merged for each part."""
    plan = call.plan
    out = rows.new_empty((parts, 4, plan.channels))
    forward.merge[parts, -(-plan.channels // COLUMNS)](
        rows, plan.table, plan.listed, plan.tiles, parts, out, plan.channels,
        ALL=call.one_part, STEP=STEP, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


def _buffers(holders: Sequence[Any]) -> tuple[Tensors | None, Tensors | None, Tensors | None]:
    if not holders:
        return None, None, None
    of_each = [holder._buffers for holder in holders]  # attributes take ten times as long
    return (
        tuple([b["running_mean"] for b in of_each]),
        tuple([b["running_var"] for b in of_each]),
        tuple([b["num_batches_tracked"] for b in of_each]),
    )


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd, which did not see the kernels write."""
    torch.autograd.graph.increment_version(tensors)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one, where launches go."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)
