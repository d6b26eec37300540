"""Shuffling RoIs among processes beside sending all of them to everybody, and beside SyncBN."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.equality import ResultsDiffer, require_equal
from benchmarks.result import Result
from benchmarks.timing import Options, alternate
from machine.processes import run_processes
from rethinking_bn.distributed import all_gather_object, get_rank
from rethinking_bn.layers import BatchNorm2d, SyncBatchNorm2d, shuffle_rows, unshuffle_rows

_OURS, _OTHER = "shuffle_rows", "padded all_gather"
_SEED = 17


class PaddedState(NamedTuple):
    """The rows each rank holds before; the number of the row in each slot; the slots of a rank."""

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
        return _everyones(x, state.rows)[state.order.split(state.slots)[dist.get_rank()]]

    def unshuffle(self, rows: Tensor, state: PaddedState) -> Tensor:
        """Return this rank's rows in their old order."""
        own = state.order.argsort().split(state.rows)[dist.get_rank()]
        return _everyones(rows, state.slots)[own]


def _everyones(x: Tensor, sizes: list[int]) -> Tensor:
    padded = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])])
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


def run(options: Options, other: type[PaddedShuffle] = PaddedShuffle) -> Result:
    """Compare shuffle + unshuffle + backward of both at several numbers of processes.

    Args:
        other: the other side's implementation.
    """
    result = Result("shuffle")
    rows = options.pick(quick=6, cpu=128, cuda=1024)
    shape = options.pick(quick=(3, 2, 2), cpu=(256, 7, 7), cuda=(256, 7, 7))
    for world in options.pick(quick=(2,), cpu=(2, 4, 8), cuda=(2, 4, 8)):
        device = options.device_for(world)
        args = (rows, shape, options, other)
        answers = run_processes(_measure, world, *args, device=device, expected=ResultsDiffer)
        for name in answers[0]["checks"]:
            worst = max(answer["checks"][name] for answer in answers)
            result.checks[f"{world} ranks, {name}"] = worst
        times = answers[0]["times"]
        case = f"{world} processes, {rows} rows of {shape}, {device.type}"
        result.measure(case, (_OURS, times[_OURS]), (_OTHER, times[_OTHER]))
    for world in options.pick(quick=(2,), cpu=(2, 4), cuda=(2, 4)):
        device = options.device_for(world)
        answers = run_processes(_by_depth, world, rows, shape, options, device=device)
        for depth, times in answers[0].items():
            case = f"{world} processes, {depth} norm layers on {rows} rows of {shape}"
            result.measure(case, *((side, times[side]) for side in ("shuffle and BN", "SyncBN")))
    result.notes.append("shuffle and BN, SyncBN: two functions, so their results are not compared")
    result.notes.append("a round lasts as long as its slowest rank; one thread a process")
    return result


def _measure(
    device: torch.device,
    count: int,
    shape: tuple[int, ...],
    options: Options,
    other: type[PaddedShuffle],
) -> dict[str, Any]:
    """Run on one rank: check with uneven rows, then time with even ones."""
    padded = other()
    checks = _check(device, max(count // 4, 2), shape, padded)
    generator = torch.Generator().manual_seed(get_rank())
    x = torch.randn(count, *shape, generator=generator).to(device).requires_grad_()
    dy = torch.randn(count, *shape, generator=generator).to(device)

    def ours() -> Tensor:
        rows, state = shuffle_rows(x, generator_seed=_SEED)
        return torch.autograd.grad(unshuffle_rows(rows, state), x, dy)[0]

    def theirs() -> Tensor:
        state = padded.plan(x, _SEED)
        rows = padded.shuffle(x, state)
        return torch.autograd.grad(padded.unshuffle(rows, state), x, dy)[0]

    sides = {_OURS: ours, _OTHER: theirs}
    for name, step in sides.items():
        checks[f"{name}, gradient"] = require_equal(name, [step()], [dy], 0.0)
    return {"checks": checks, "times": alternate(sides, options, 8.0, together=device)}


def _by_depth(
    device: torch.device, count: int, shape: tuple[int, ...], options: Options
) -> dict[int, dict[str, list[float]]]:
    """Time a head of norm layers alone: rows sent there and back, or moments sent by each layer."""
    generator = torch.Generator().manual_seed(get_rank())
    x = torch.randn(count, *shape, generator=generator).to(device).requires_grad_()
    times = {}
    for depth in options.pick(quick=(1, 2), cpu=(1, 2, 4, 8, 16), cuda=(1, 2, 4, 8, 16)):
        by_rank, synced = (
            nn.Sequential(*(kind(shape[0]) for _ in range(depth))).to(device)
            for kind in (BatchNorm2d, SyncBatchNorm2d)
        )

        def shuffled(head: nn.Module = by_rank) -> Tensor:
            rows, state = shuffle_rows(x, generator_seed=_SEED)
            return torch.autograd.grad(unshuffle_rows(head(rows), state), x, x.detach())[0]

        def pooled(head: nn.Module = synced) -> Tensor:
            return torch.autograd.grad(head(x), x, x.detach())[0]

        sides = {"shuffle and BN": shuffled, "SyncBN": pooled}
        times[depth] = alternate(sides, options, 4.0, together=device)
    return times


def _check(
    device: torch.device, count: int, shape: tuple[int, ...], padded: PaddedShuffle
) -> dict[str, float]:
    """Give both one permutation of uneven rows; compare rows, results and gradients bit for bit."""
    rank, world = get_rank(), dist.get_world_size()
    sizes = [count + 3 * (r % 3) - (count if r == 1 else 0) for r in range(world)]  # rank 1: 3 rows
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(sizes[rank], *shape, generator=generator).to(device).requires_grad_()
    dy = torch.randn(sizes[rank], *shape, generator=generator).to(device)
    numbers = torch.arange(sum(sizes)).split(sizes)[rank].to(device)
    held = all_gather_object(shuffle_rows(numbers, generator_seed=_SEED)[0].tolist())
    order = torch.tensor([number for numbers in held for number in numbers], device=device)
    known = PaddedState(sizes, order, [len(numbers) for numbers in held])

    factor = float(rank + 1)  # what is done to a row depends on where it is done
    mine, state = shuffle_rows(x, generator_seed=_SEED)
    back = unshuffle_rows(mine * factor, state)
    others = padded.shuffle(x, known)
    others_back = padded.unshuffle(others * factor, known)
    gradients = [torch.autograd.grad(out, x, dy)[0] for out in (back, others_back)]
    return {
        "rows": require_equal("shuffled rows", [mine], [others], 0.0),
        "results": require_equal("unshuffled rows", [back], [others_back], 0.0),
        "gradients": require_equal("gradients", gradients[:1], gradients[1:], 0.0),
    }
