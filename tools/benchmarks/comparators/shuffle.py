"""Shuffling rows by sending all of them to everybody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class PaddedState:
    """A shuffle as every rank knows it. T rows in all, W ranks.

    Attributes:
        rows: how many each rank holds before.
        order: (T,) the number of the row in each slot; rows are numbered rank after rank.
        slots: how many each rank holds after; consecutive slots go to one rank.
    """

    rows: list[int]
    order: Tensor
    slots: list[int]


class PaddedShuffle:
    """Pad, all_gather, and keep the rows that the permutation gives to this rank.

    What examples of shuffled BatchNorm do: every row travels to every rank, and the backward adds
    up gradients of the size of all rows by an all_reduce. With a batch that is not a multiple of
    the ranks, those examples leave the last rank short; here slots differ by at most one.
    """

    def plan(self, x: Tensor, seed: int) -> PaddedState:
        """Exchange the row counts and draw the permutation of a seed that all ranks share."""
        world = dist.get_world_size()
        counts = [torch.empty(1, dtype=torch.int64, device=x.device) for _ in range(world)]
        dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
        rows = [int(count) for count in counts]
        total = sum(rows)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        slots = [(r + 1) * total // world - r * total // world for r in range(world)]
        return PaddedState(rows, order.to(x.device), slots)

    def shuffle(self, x: Tensor, state: PaddedState) -> Tensor:
        """Return the rows of this rank's slots."""
        return _everyones(x, state.rows)[_own(state.order, state.slots)]

    def unshuffle(self, rows: Tensor, state: PaddedState) -> Tensor:
        """Return this rank's rows in their old order."""
        return _everyones(rows, state.slots)[_own(state.order.argsort(), state.rows)]


def _own(values: Tensor, sizes: list[int]) -> Tensor:
    return values.split(sizes)[dist.get_rank()]


def _everyones(x: Tensor, sizes: list[int]) -> Tensor:
    longest = max(sizes)
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    gathered = _Gather.apply(padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gathered = x.new_empty(dist.get_world_size(), *x.shape)
        dist.all_gather(list(gathered), x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[dist.get_rank()]
