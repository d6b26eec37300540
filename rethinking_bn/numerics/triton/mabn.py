"""Moving average batch normalisation of tensors that share statistics, in six launches a step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rethinking_bn.numerics.moving_average import Statistics
from rethinking_bn.numerics.normalize_function import differentiable_once
from rethinking_bn.numerics.triton import backward, moving
from rethinking_bn.numerics.triton.batch_norm import (
    COLUMNS,
    STEP,
    mark_written,
    on_device,
)
from rethinking_bn.numerics.triton.choice import layout
from rethinking_bn.numerics.triton.plan import Plan, make_plan, power_of_two


def _plan(xs: Sequence[Tensor]) -> Plan:
    shapes = tuple([x.shape for x in xs])
    last = layout(xs) is torch.channels_last
    return make_plan(shapes, None, last, xs[0].element_size(), xs[0].device)


@lru_cache(maxsize=64)
def _about_zero(channels: int, device: torch.device) -> Tensor:
    """Return the statistics (4, 1, C) count, mean, rest, 1/σ that leave a tensor as it is."""
    return torch.tensor([1.0, 0.0, 0.0, 1.0], device=device).view(4, 1, 1).repeat(1, 1, channels)


def _sums(dys: Sequence[Tensor], xs: Sequence[Tensor], plan: Plan, stats: Tensor) -> Tensor:
    """Return the tiles' rows of Σ dy and Σ dy·x."""
    rows = stats.new_empty((plan.tiles, 2, plan.channels))
    backward.gradient_sums[plan.grid](
        tuple(dys), tuple(xs), plan.table, stats, 1, rows, plan.channels, L=len(xs), POOLED=True,
        **plan.block,
    )  # fmt: skip
    return rows


def _values(xs: Sequence[Tensor]) -> float:
    """Return the number of values per channel."""
    return float(sum(x.numel() for x in xs) // xs[0].shape[1])


@torch.no_grad()
def advance(
    xs: Sequence[Tensor],
    running: Tensor,
    ring: Tensor,
    counter: Tensor,
    *,
    eps: float,
    momentum: float,
    r_max: float,
    first_moving: int,
    last_uncorrected: int,
) -> Statistics:
    """Make one iteration of MABN's state from inputs of which one at least is not empty.

    Args:
        running: (C,) R, moved here, as ``ring`` (m, C), the last mean squares.
        counter: () how many were pushed; :func:`normalize` counts this one.
        first_moving: iteration from which S is the ring's mean.
        last_uncorrected: the last iteration with r = 1.
    """
    plan = _plan(xs)
    channels, m = plan.channels, len(ring)
    out = running.new_empty((3, channels))
    moves = torch.empty((), dtype=torch.bool, device=running.device)
    with on_device(running.device):
        rows = _sums(xs, xs, plan, _about_zero(channels, running.device))
        moving.advance[(-(-channels // COLUMNS),)](
            rows, plan.tiles, _values(xs), ring, counter, m, running, momentum, eps, r_max,
            first_moving, last_uncorrected, out, moves, channels, SLOTS=power_of_two(m),
            STEP=STEP, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
    mark_written([running, ring])
    own, smoothed, correction = out.unbind()
    return Statistics(own, smoothed, correction, moves)


def normalize(
    xs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    by: Statistics,
    eps: float,
    counter: Tensor | None,
    gradient_ring: Tensor,
    gradient_counter: Tensor,
) -> list[Tensor]:
    """Normalise with MABN's backward, as the eager path's ``mabn_normalize`` does.

    Args:
        by: the iteration's. The graph keeps this very object.
        counter: () int64 to add the iteration to; None where it is counted already.
        gradient_ring: (m, C) the last p, which a backward moves; ``gradient_counter`` counts them.
    """
    call = _Call(_plan(xs), by, eps, counter, gradient_ring, gradient_counter)
    return list(_Normalize.apply(call, weight, bias, *xs))


class _Call(NamedTuple):
    plan: Plan
    by: Statistics
    eps: float
    counter: Tensor | None
    ring: Tensor
    ring_counter: Tensor


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: _Call, weight: Tensor | None, bias: Tensor | None, *xs: Tensor
    ) -> tuple[Tensor, ...]:
        # The iteration travels outside the saved tensors: it stays that of the first pass when
        # activation checkpointing replaces the saved tensors by recomputed ones.
        ctx.call, ctx.bias_type = call, None if bias is None else bias.dtype
        ctx.save_for_backward(weight, *xs)
        plan, by = call.plan, call.by
        ys = tuple([torch.empty_like(x) for x in xs])
        with on_device(by.own.device):
            moving.scale_and_shift[plan.grid](
                xs, ys, plan.table, by.smoothed, by.correction, weight, bias, call.eps,
                call.counter, plan.channels, L=len(xs), **plan.block,
            )  # fmt: skip
        if call.counter is not None:
            mark_written([call.counter])
        return ys

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        plan, by = call.plan, call.by
        weight, *xs = ctx.saved_tensors
        memory_format = torch.channels_last if plan.last else torch.contiguous_format
        dys = [dy.contiguous(memory_format=memory_format) for dy in grads]
        needs = ctx.needs_input_grad
        grad_weight = torch.empty_like(weight) if needs[1] else None
        shape = (plan.channels,)
        grad_bias = by.own.new_empty(shape, dtype=ctx.bias_type) if needs[2] else None
        channels, m = plan.channels, len(call.ring)
        coefficients = by.own.new_empty((2, channels))
        dxs = tuple([torch.empty_like(x) for x in xs])
        with on_device(by.own.device):
            rows = _sums(dys, xs, plan, _about_zero(channels, by.own.device))
            moving.average[(-(-channels // COLUMNS),)](
                rows, plan.tiles, _values(xs), call.ring, call.ring_counter, m, by.smoothed,
                by.correction, by.moving, weight, grad_weight, grad_bias, coefficients, call.eps,
                channels, SLOTS=power_of_two(m), STEP=STEP, COLUMNS=COLUMNS, num_warps=4,
            )  # fmt: skip
            moving.combine[plan.grid](
                tuple(dys), tuple(xs), dxs, plan.table, coefficients, call.ring_counter, channels,
                L=len(xs), **plan.block,
            )  # fmt: skip
        mark_written([call.ring, call.ring_counter])
        return (None, grad_weight, grad_bias, *dxs)
