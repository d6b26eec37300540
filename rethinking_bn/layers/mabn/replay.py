"""Finding again, while activation checkpointing recomputes a forward, what it normalised by."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from rethinking_bn.numerics.moving_average import Statistics

_HELD = 64


class ForwardRecords:
    """The statistics of the forwards of one layer that a backward may still ask for.

    A recomputation has no name for the forward it repeats: a segment may hold several uses of the
    layer, segments come back in reverse order, and a recomputation may stop early. What is the
    same in both passes is the input, so the record is the one whose own mean square is nearest to
    the recomputed one (equal, but for kernels that are not deterministic). It is chosen on the
    device, without waiting for it. Among equal ones the least often recomputed is taken, then the
    oldest, which is the order within a segment; only bit-identical inputs in different segments
    can be exchanged.

    A record lives as long as the graph of its forward; those of forwards without a graph (the
    first pass of reentrant checkpointing) are held until 64 newer ones have come.
    """

    def __init__(self) -> None:
        self._records: list[weakref.ref[Statistics]] = []
        self._held: deque[Statistics] = deque(maxlen=_HELD)

    def remember(self, statistics: Statistics, *, hold: bool) -> None:
        """Add the newest forward; ``hold`` it unless a graph does."""
        if hold:
            self._held.append(statistics)
        self._records = [record for record in self._records if record() is not None]
        self._records.append(weakref.ref(statistics))

    def recall(self, own: Tensor) -> Statistics | None:
        """Return the statistics of the forward whose input has the mean square ``own`` (C,)."""
        live = [statistics for record in self._records if (statistics := record()) is not None]
        live = [s for s in live if s.own.dtype == own.dtype and s.own.device == own.device]
        return _nearest(live, own) if live else None


def _nearest(records: Sequence[Statistics], own: Tensor) -> Statistics:
    owns = torch.stack([record.own for record in records])
    distance = torch.where(owns == own, torch.zeros_like(owns), (owns - own).abs()).sum(1)
    zero = torch.zeros((), dtype=torch.long, device=own.device)
    replays = torch.stack([zero if r.replays is None else r.replays for r in records])
    order = torch.arange(len(records), device=own.device) + replays * len(records)
    last = torch.iinfo(order.dtype).max
    index = torch.where(distance == distance.min(), order, torch.full_like(order, last)).argmin()
    replays = replays.index_add(0, index.view(1), torch.ones_like(index).view(1))
    for record, times in zip(records, replays.unbind(), strict=True):
        record.replays = times

    def pick(name: str) -> Tensor:
        like = owns if name != "moving" else replays > 0
        values = [torch.as_tensor(getattr(record, name)).to(like) for record in records]
        # index_select, because indexing by a tensor of no dimension would wait for the device
        stacked = torch.stack([value.expand(like.shape[1:]) for value in values])
        return stacked.index_select(0, index.view(1))[0]

    return Statistics(own, pick("smoothed"), pick("correction"), pick("moving"))
