"""The permutation of a shuffle, drawn alike on every rank, and each rank's part in it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
