"""The permutation of a shuffle, drawn alike on every rank, and the rows sent by it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rethinking_bn.distributed import all_to_all_rows

# Rows are moved as numbers of the largest size that divides their bytes: fewer are faster.
_CARRIERS = {16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True, eq=False)
class Exchange:
    """This rank's part in one direction of a shuffle: R rows go in, S rows come out.

    Attributes:
        order: (R,) the local rows in the order in which they are packed: those that leave, grouped
            by destination, then those that stay.
        place: (S,) for each row of the result, its index among the rows that arrive, grouped by
            source, followed by those that stay.
        sent, received: how many rows go to each rank, and come from it; 0 for this one.
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


def plan_exchange(rows: Sequence[int], rank: int, seed: int) -> Exchange:
    """Return this rank's part in the permutation of ``rows[r]`` rows of each rank r."""
    world, total = len(rows), sum(rows)
    # torch's CPU generator looks at 32 bits of its seed; hashed, all bits of ours count.
    generator = torch.Generator("cpu").manual_seed(stable_hash(seed) % 2**32)
    row_in_slot = torch.randperm(total, generator=generator, device="cpu")
    first_row = torch.tensor([0, *rows], device="cpu").cumsum(0)
    first_slot = torch.tensor([r * total // world for r in range(world + 1)], device="cpu")

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


def _invert(permutation: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse


def stable_hash(value: object) -> int:
    """Return a signed 64-bit hash of ``repr(value)``, the same in every process."""
    code = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(code, "little", signed=True)


def exchange_rows(
    x: Tensor, exchange: Exchange, channels_last: bool, group: ProcessGroup | None
) -> Tensor:
    """Return (S, ...), what this rank gets of all ranks' rows (R, ...)."""
    shape = (len(exchange.place), *x.shape[1:])
    channels_last = channels_last and x.dim() in _CHANNELS_LAST
    memory_format = _CHANNELS_LAST[x.dim()] if channels_last else torch.contiguous_format
    # It is written through views. Were it a view itself, autograd would forbid changes in place.
    result = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    source, target = _as_rows(x, channels_last), _as_rows(result, channels_last)
    carrier = _carrier(source, target)
    source, target = source.view(carrier), target.view(carrier)
    if len(exchange.sent) == 1:
        torch.index_select(source, 0, exchange.order[exchange.place], out=target)
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


def _as_rows(x: Tensor, channels_last: bool) -> Tensor:
    """View (R, ...) as (R, K), a row in the order it is stored; copied where that has no view."""
    rows, columns = len(x), math.prod(x.shape[1:])
    return (x.movedim(1, -1) if channels_last else x).reshape(rows, columns)


def _carrier(*matrices: Tensor) -> torch.dtype:
    """Return the widest type as which the rows of all these matrices (R, K) can be viewed."""
    element = matrices[0].element_size()
    sizes = (
        size for size in _CARRIERS if all(_can_be_viewed(m, size // element) for m in matrices)
    )
    return _CARRIERS[next(sizes, element)]


def _can_be_viewed(matrix: Tensor, elements: int) -> bool:
    """Return whether ``elements`` neighbours in every row can be read as one number."""
    lengths = (matrix.shape[1], matrix.stride(0), matrix.storage_offset())
    if elements < 2 or not matrix.numel() or matrix.stride(1) != 1:
        return False
    return all(length % elements == 0 for length in lengths)


def layout_vote(x: Tensor) -> int:
    """Return 2 if ``x`` is channels-last, 1 if it is not, 0 if it has no say (it may be both)."""
    last = _CHANNELS_LAST.get(x.dim())
    if x.numel() == 0 or last is None:
        return 0
    is_last = x.is_contiguous(memory_format=last)
    return 0 if is_last and x.is_contiguous() else 1 + is_last
