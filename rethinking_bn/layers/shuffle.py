"""Shuffle rows (RoIs) over all ranks and bring them back: the exchange behind "shuffle BN".

With all RoIs of a GPU cut from one or two images, a BatchNorm head learns to read the image from
its batch. Permuting the RoIs of all GPUs before the normalised layers, and back after them, makes
every batch a mix of all images ("Rethinking 'Batch' in BatchNorm", section 6, table 6).

Every rank derives the same permutation from a seed, so that a shuffle takes one small exchange
(how many rows each rank holds, and that all agree on the rest) and one ``all_to_all_single`` of
the rows that change their rank; an unshuffle, and the backward of either, takes only the latter.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from ..distributed import (
    all_gather,
    all_gather_object,
    all_to_all_rows,
    collective_device,
    get_rank,
    get_world_size,
)

# Rows are moved as integers of their size: the bits arrive, whatever they mean.
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NO_ROWS = "missing (0-dimensional tensor)"
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True, eq=False)
class Exchange:
    """One direction of a shuffle, as this rank takes part in it. W ranks, R rows in, S rows out.

    Attributes:
        order: (R,) the local rows in the order they are packed: those that leave, grouped by
            destination, then those that stay.
        place: (S,) for each row of the result, its index among the rows that arrive, grouped by
            source, followed by those that stay.
        sent: W row counts, what goes to each rank; 0 to this one.
        received: W row counts, what comes from each rank; 0 from this one.
    """

    order: Tensor
    place: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]

    def reversed(self) -> Exchange:
        """Return the exchange that undoes this one."""
        return Exchange(_invert(self.place), _invert(self.order), self.received, self.sent)

    def to(self, device: torch.device) -> Exchange:
        """Return the exchange with its indices on ``device``, moved in one copy."""
        indices = torch.cat([self.order, self.place]).to(device, non_blocking=True)
        rows = len(self.order)
        return Exchange(indices[:rows], indices[rows:], self.sent, self.received)


@dataclass(frozen=True, eq=False)
class ShuffleState:
    """What :func:`unshuffle_rows` needs to know of a shuffle; the same kind on every rank.

    Attributes:
        there, back: the exchange and its inverse, indices on the device of the rows.
        requires_grad: whether the rows of any rank required grad.
        channels_last: whether 4-d and 5-d rows travel, and come out, in channels-last format.
        group: the process group, None for the default one.
    """

    there: Exchange
    back: Exchange
    requires_grad: bool
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
    there = _plan(rows, get_rank(group), seed).to(x.device)
    state = ShuffleState(there, there.reversed(), requires_grad, channels_last, group)
    return _apply(x, state, there, state.back, channels_last), state


def unshuffle_rows(rows: Tensor, state: ShuffleState) -> Tensor:
    """Bring rows back to the rank and the place they had before :func:`shuffle_rows`.

    There is no header exchange: ``rows`` must have one trailing shape and dtype on all ranks, as
    the outputs of one head have, zero rows included. Neither needs to be that of the shuffled
    rows (features go in, logits come out).

    Differentiable once, exactly. The result requires grad on every rank if the shuffled rows of
    any rank or ``rows`` did, so that a rank without rows, whose head may have returned a
    constant, still takes part in the backward. Where no shuffled rows required grad, ``rows``
    must require grad on all ranks or on none. What the losses must guarantee is said at
    :func:`shuffle_rows`.

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
    channels_last = _layout(rows) == 2 if alone else state.channels_last
    return _apply(rows, state, state.back, state.there, channels_last)


def _agree(x: Tensor, seed: int, group: ProcessGroup | None) -> tuple[list[int], bool, bool]:
    """Exchange the header: return the row counts, and whether any rows require grad and all are
    channels-last."""
    shape = tuple(x.shape[1:]) if x.dim() else _NO_ROWS
    # One digest stands for all that must be equal; the values themselves are only told when not.
    digest = _digest((seed, shape, str(x.dtype)))
    gradients = int(torch.is_grad_enabled()) * (2 if x.requires_grad else 1)
    header = torch.tensor(
        [len(x) if x.dim() else 0, int(x.dim() > 0), gradients, _layout(x), digest]
    )
    if get_world_size(group) > 1:
        header = header.to(collective_device(group))
    rows, has_rows, modes, layouts, digests = all_gather(header, group).t().tolist()
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
            said = (
                f"{value} on rank{'s' if len(on) > 1 else ''} {', '.join(on)}"
                for value, on in ranks.items()
            )
            complaints.append(f"{name} is {' and '.join(said)}")
    return f"shuffle_rows needs the same kind of rows on every rank: {'; '.join(complaints)}"


def _layout(x: Tensor) -> int:
    """Return 2 if ``x`` is channels-last, 1 if it is not, 0 if it has no say (it may be both)."""
    last = _CHANNELS_LAST.get(x.dim())
    if x.numel() == 0 or last is None:
        return 0
    is_last = x.is_contiguous(memory_format=last)
    return 0 if is_last and x.is_contiguous() else 1 + is_last


def _plan(rows: Sequence[int], rank: int, seed: int) -> Exchange:
    """Return this rank's part in the permutation of ``rows[r]`` rows of each rank r."""
    world, total = len(rows), sum(rows)
    # torch's CPU generator looks at 32 bits of its seed; hashed, all bits of ours count.
    generator = torch.Generator().manual_seed(_digest(seed) % 2**32)
    row_in_slot = torch.randperm(total, generator=generator)
    first_row = torch.tensor([0, *rows]).cumsum(0)
    first_slot = torch.tensor([r * total // world for r in range(world + 1)])

    def grouped(peers: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Order by peer, this rank last; return that order and the counts, 0 for this rank."""
        counts = peers.bincount(minlength=world).tolist()
        counts[rank] = 0
        return torch.where(peers == rank, world, peers).argsort(stable=True), tuple(counts)

    # Both ends of a message list its rows by slot.
    arriving = row_in_slot[first_slot[rank] : first_slot[rank + 1]]
    arrival, received = grouped(torch.bucketize(arriving, first_row[1:], right=True))
    slots = _invert(row_in_slot)[first_row[rank] : first_row[rank + 1]]
    slots, by_slot = slots.sort()
    departure, sent = grouped(torch.bucketize(slots, first_slot[1:], right=True))
    return Exchange(by_slot[departure], _invert(arrival), sent, received)


def _apply(
    x: Tensor, state: ShuffleState, exchange: Exchange, inverse: Exchange, channels_last: bool
) -> Tensor:
    """Run ``exchange``, recorded for the backward if the gradient of any rank may pass here."""
    shared = len(exchange.sent) > 1 and state.requires_grad
    differentiable = x.is_floating_point() or x.is_complex()
    if torch.is_grad_enabled() and differentiable and (x.requires_grad or shared):
        # A node needs an input that requires grad, or this rank would miss the backward.
        anchor = None if x.requires_grad else x.new_empty(0, requires_grad=True)
        result: Tensor = _ExchangeRows.apply(
            x, anchor, exchange, inverse, channels_last, state.group
        )
        return result
    return _exchange_rows(x.detach(), exchange, channels_last, state.group)


class _ExchangeRows(torch.autograd.Function):
    """Run an exchange; the gradient is brought back by its inverse, bit for bit."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor | None,
        exchange: Exchange,
        inverse: Exchange,
        channels_last: bool,
        group: ProcessGroup | None,
    ) -> Tensor:
        ctx.arguments = inverse, channels_last, group
        return _exchange_rows(x, exchange, channels_last, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Also where x itself needs no gradient: the rows of other ranks may.
        grad = _exchange_rows(grad, *ctx.arguments)
        return grad if ctx.needs_input_grad[0] else None, None, None, None, None, None


def _exchange_rows(
    x: Tensor, exchange: Exchange, channels_last: bool, group: ProcessGroup | None
) -> Tensor:
    """Return (S, ...), the rows of all ranks' (R, ...) as ``exchange`` distributes them."""
    shape = (len(exchange.place), *x.shape[1:])
    channels_last = channels_last and x.dim() in _CHANNELS_LAST
    memory_format = _CHANNELS_LAST[x.dim()] if channels_last else torch.contiguous_format
    # Written through views: the result must not itself be one, or autograd would forbid the
    # caller to change it in place.
    result = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    source, target = _as_matrix(x, channels_last), _as_matrix(result, channels_last)
    if len(exchange.sent) == 1:
        torch.index_select(source, 0, exchange.order, out=target)
        return result
    leaving, arriving = sum(exchange.sent), sum(exchange.received)
    packed = source.index_select(0, exchange.order[:leaving])
    arrived = source.new_empty((len(exchange.place), source.shape[1]))
    work = all_to_all_rows(arrived[:arriving], packed, exchange.received, exchange.sent, group)
    torch.index_select(source, 0, exchange.order[leaving:], out=arrived[arriving:])
    if work is not None:
        work.wait()
    torch.index_select(arrived, 0, exchange.place, out=target)
    return result


def _as_matrix(x: Tensor, channels_last: bool) -> Tensor:
    """View (R, ...) as (R, K) integers of the same size, a row in the order it is stored."""
    rows, columns = len(x), math.prod(x.shape[1:])
    x = x.movedim(1, -1) if channels_last else x
    return x.reshape(rows, columns).view(_CARRIERS.get(x.element_size(), x.dtype))


def _invert(permutation: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse


def _digest(value: object) -> int:
    """Return a signed 64-bit hash of ``repr(value)``, the same in every process."""
    code = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(code, "little", signed=True)
