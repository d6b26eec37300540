"""Shuffle rows (RoIs) over all ranks and bring them back: the exchange behind "shuffle BN".

With all RoIs of a GPU cut from one or two images, a BatchNorm head learns to read the image from
its batch, and fails at inference. Permuting the RoIs of all GPUs before the normalised layers, and
back after them, makes every batch a mix of all images (arXiv 2105.07576, section 6, table 6).

Every rank derives the permutation from a seed. A shuffle takes one small exchange (how many rows
each rank holds, and that all agree on the rest) and one ``all_to_all_single`` of the rows that
change their rank; an unshuffle, and the backward of either, takes only the latter.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from rethinking_bn.distributed import all_gather_object, gather_numbers, get_rank
from rethinking_bn.shuffle.exchange import (
    Exchange,
    exchange_rows,
    layout_vote,
    plan_exchange,
    stable_hash,
)

_NO_ROWS = "missing (0-dimensional tensor)"


@dataclass(frozen=True, eq=False)
class ShuffleState:
    """What :func:`unshuffle_rows` needs to know of a shuffle; the same kind on every rank.

    Attributes:
        there, back: the exchange and its inverse, indices on the device of the rows.
        link: when the rows of any rank required grad, an empty output of the shuffle's autograd
            node; as an input of the unshuffle's it lets every backward reach the shuffle's.
        channels_last: whether 4-d and 5-d rows travel, and come out, in channels-last format.
        group: the process group, None for the default one.
    """

    there: Exchange
    back: Exchange
    link: Tensor | None
    channels_last: bool
    group: ProcessGroup | None


def shuffle_rows(
    x: Tensor, *, generator_seed: int, group: ProcessGroup | None = None
) -> tuple[Tensor, ShuffleState]:
    """Permute rows over all ranks, uniformly over all permutations of all rows of all ranks.

    Rank r of W receives the slots r·T // W to (r + 1)·T // W of the T rows in their new order, so
    that ranks differ by one row at most, whatever they held before. Only rows that leave a rank
    are sent. With one process the permutation is local and nothing is sent.

    Every rank of the group must call this, in the same order relative to other collectives. It is
    differentiable once, exactly: gradients travel back by the inverse exchange. As soon as the
    rows of one rank require grad, those returned require grad on all ranks, and the backward is
    a collective that all of them must reach. So **the loss of every rank must depend on what the
    rank gets back from** :func:`unshuffle_rows`, **also when that has zero rows**: add ``0 *
    out.sum()`` where a loss would be a constant, as detectron2's losses do. With
    ``torch.autograd.grad`` or ``backward(inputs=...)`` either all ranks or none must ask for a
    gradient that flows through the shuffle.

    Args:
        x: (R, ...) rows of any dtype and stride. R may differ between ranks and be 0 on any or
            all of them; everything else must agree.
        generator_seed: any integer, the same on all ranks, another one for each call that is to
            have another permutation.
        group: the process group, None for the default one.

    Returns:
        (S, ...) the rows this rank now holds, in the channels-last format if every rank's ``x``
        was; and the state that takes them, or what was computed from them, back.

    Raises:
        ValueError: on every rank alike, when ranks disagree on the seed, the row shape, the dtype
            or (while some rows require grad) on whether gradients are enabled, or when ``x`` has
            no dimensions.
    """
    seed = operator.index(generator_seed)
    rows, requires_grad, channels_last = _agree(x, seed, group)
    there = plan_exchange(rows, get_rank(group), seed).to(x.device)
    back = there.reversed()
    # A node needs an input that requires grad, or this rank would miss the backward.
    anchor = x.new_empty(0, requires_grad=True) if requires_grad and len(rows) > 1 else None
    result, link = _apply(x, anchor, there, back, channels_last, group)
    return result, ShuffleState(there, back, link, channels_last, group)


def unshuffle_rows(rows: Tensor, state: ShuffleState) -> Tensor:
    """Bring rows back to the rank and the place they had before :func:`shuffle_rows`.

    ``rows`` must have one trailing shape and dtype on all ranks, zero rows included. Neither needs
    to be that of the shuffled rows (features go in, logits come out).

    It is differentiable once, exactly. With several ranks the result requires grad on all of them
    if the shuffled rows of any rank did, and its backward always goes on to the shuffle's: a rank
    without rows, whose head may have returned a constant, takes part in both. Where no shuffled
    rows required grad, ``rows`` must require grad on all ranks or on none. :func:`shuffle_rows`
    says what the losses must guarantee.

    Args:
        rows: (S, ...) one row for each row that :func:`shuffle_rows` returned, in that order.
        state: what :func:`shuffle_rows` returned.

    Returns:
        (R, ...) one row for each row that was shuffled on this rank, in their order.

    Raises:
        ValueError: on this rank, before anything is sent, when the number of rows is not S.
    """
    expected = len(state.there.place)
    if rows.dim() == 0 or len(rows) != expected:
        raise ValueError(
            f"unshuffle_rows needs the {expected} rows that shuffle_rows returned, "
            f"got a tensor of shape {tuple(rows.shape)}"
        )
    # The format on the wire must not depend on what this rank alone knows.
    alone = len(state.there.sent) == 1
    channels_last = layout_vote(rows) == 2 if alone else state.channels_last
    return _apply(rows, state.link, state.back, state.there, channels_last, state.group)[0]


def _agree(x: Tensor, seed: int, group: ProcessGroup | None) -> tuple[list[int], bool, bool]:
    """Return the row counts, whether any rows require grad, and whether all are channels-last."""
    shape = tuple(x.shape[1:]) if x.dim() else _NO_ROWS
    # One digest stands for all that must be equal; the values themselves are only told when not.
    digest = stable_hash((seed, shape, str(x.dtype)))
    gradients = int(torch.is_grad_enabled()) * (2 if x.requires_grad else 1)
    header = [len(x) if x.dim() else 0, int(x.dim() > 0), gradients, layout_vote(x), digest]
    everyone = zip(*gather_numbers(header, group), strict=True)
    rows, has_rows, modes, layouts, digests = (list(values) for values in everyone)
    requires_grad = 2 in modes
    if len(set(digests)) > 1 or 0 in has_rows or (requires_grad and 0 in modes):
        described = {"seed": seed, "row shape": shape, "dtype": x.dtype}
        if requires_grad:
            described["gradients"] = "enabled" if torch.is_grad_enabled() else "disabled"
        raise ValueError(_disagreement(all_gather_object(described, group)))
    return rows, requires_grad, 2 in layouts and 1 not in layouts


def _disagreement(described: Sequence[dict[str, Any]]) -> str:
    """Return the message that names what the ranks disagree on, with each value and its ranks."""
    complaints = []
    for name in described[0]:
        ranks: dict[Any, list[str]] = {}
        for rank, values in enumerate(described):
            ranks.setdefault(values[name], []).append(str(rank))
        if len(ranks) > 1 or _NO_ROWS in ranks:
            said = (f"{value} on rank {', '.join(on)}" for value, on in ranks.items())
            complaints.append(f"{name} is {' and '.join(said)}")
    return f"shuffle_rows needs the same kind of rows on every rank: {'; '.join(complaints)}"


def _apply(x: Tensor, anchor: Tensor | None, *way: Any) -> tuple[Tensor, Tensor | None]:
    """Exchange rows; return the result and, of an autograd node, the empty second output.

    ``anchor``, an empty tensor, may need the node. The way is an exchange, the inverse that brings
    gradients back, whether rows are channels-last, and the group.
    """
    differentiable = x.is_floating_point() or x.is_complex()
    recorded = differentiable and (x.requires_grad or anchor is not None)
    if recorded and torch.is_grad_enabled():
        outputs: tuple[Tensor, Tensor | None] = _ExchangeRows.apply(x, anchor, *way)
        return outputs
    exchange, _, channels_last, group = way
    return exchange_rows(x.detach(), exchange, channels_last, group), None


class _ExchangeRows(torch.autograd.Function):
    """Run an exchange; the gradient is brought back by its inverse, bit for bit."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor | None, exchange: Exchange, inverse: Exchange, *how: Any
    ) -> tuple[Tensor, Tensor | None]:
        ctx.back = (inverse, *how)
        link = None if anchor is None else x.new_empty(0)
        return exchange_rows(x, exchange, *how), link

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        # Also where x itself needs no gradient: the rows of other ranks may.
        grad = exchange_rows(grad, *ctx.back)
        of_anchor = grad.new_zeros(0) if ctx.needs_input_grad[1] else None
        return grad if ctx.needs_input_grad[0] else None, of_anchor, *(None,) * 4
