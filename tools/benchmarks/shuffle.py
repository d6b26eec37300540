"""Shuffling RoIs among processes beside sending all of them to everybody."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.comparators.shuffle import PaddedShuffle, PaddedState
from benchmarks.equality import ResultsDiffer, require_equal
from benchmarks.options import Options
from benchmarks.processes import alternate_together
from benchmarks.result import Result, Table
from benchmarks.timing import Plan, Step, spread
from benchmarks.traffic import counting_traffic
from rethinking_bn.distributed import all_gather_object, get_rank
from rethinking_bn.layers import shuffle_rows, unshuffle_rows
from studies.processes import run_processes

_OURS, _OTHER = "shuffle_rows", "padded all_gather"
_BARE = "four bare all_to_all_single"  # the floor: no rows picked, packed or put in their places
_SEED = 17

Row = tuple[str | int | float, ...]


def run(options: Options, other: type[PaddedShuffle] = PaddedShuffle) -> Result:
    """Compare shuffle + unshuffle + backward of both at several numbers of processes.

    Args:
        other: the other side's implementation.
    """
    result = Result("shuffle")
    worlds = options.pick(quick=(2,), cpu=(2, 4, 8), cuda=(2, 4, 8))
    rows = options.pick(quick=6, cpu=128, cuda=1024)
    shape = options.pick(quick=(3, 2, 2), cpu=(256, 7, 7), cuda=(256, 7, 7))
    ranks: list[Row] = []
    for world in worlds:
        device = options.device_for(world)
        counts = [rows // 2, rows, 2 * rows] if world == worlds[0] else [rows]
        args = (counts, shape, options.plan(5.0))
        answers = run_processes(
            _measure, world, *args, other, device=device, expected=ResultsDiffer
        )
        for name in answers[0]["checks"]:
            worst = max(answer["checks"][name] for answer in answers)
            result.checks[f"{world} ranks, {name}"] = worst
        by_rows = answers[0]["times"]
        times = by_rows[rows]
        case = f"{world} processes, {rows} rows of {shape}, {device.type}"
        result.measure(case, (_OURS, times[_OURS]), (_OTHER, times[_OTHER]))
        result.measure(case, (_OURS, times[_OURS]), (_BARE, times[_BARE]))
        pair = [
            (side, [max(answer["sent"][rows][side] for answer in answers)])
            for side in (_OURS, _OTHER)
        ]
        name = f"{case}, most sent by a rank"
        result.measure(name, pair[0], pair[1], unit="MiB", scale=1 / 2**20)
        ranks.append((world, *_medians(times)))
        if len(by_rows) > 1:
            table: list[Row] = [(count, *_medians(value)) for count, value in by_rows.items()]
            title = f"ms by rows of a rank, {world} processes"
            result.tables.append(Table(title, ("rows", _OURS, _OTHER), table, plot=True))
    title = f"ms by ranks, {rows} rows each"
    result.tables.append(Table(title, ("ranks", _OURS, _OTHER), ranks, plot=True))
    result.notes.append("a round lasts as long as its slowest rank; one thread a process")
    return result


def _medians(times: dict[str, list[float]]) -> tuple[float, float]:
    return spread(times[_OURS]).median * 1e3, spread(times[_OTHER]).median * 1e3


def _measure(
    device: torch.device,
    counts: list[int],
    shape: tuple[int, ...],
    plan: Plan,
    other: type[PaddedShuffle],
) -> dict[str, Any]:
    """Run on one rank: check with uneven rows, then count and time with even ones."""
    padded, rank = other(), get_rank()
    checks = _check(device, max(counts[0] // 4, 2), shape, padded)
    sent: dict[int, dict[str, float]] = {}
    times: dict[int, dict[str, list[float]]] = {}
    for count in counts:
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(count, *shape, generator=generator).to(device).requires_grad_()
        dy = torch.randn(count, *shape, generator=generator).to(device)

        def ours(x: Tensor = x, dy: Tensor = dy) -> Tensor:
            rows, state = shuffle_rows(x, generator_seed=_SEED)
            return torch.autograd.grad(unshuffle_rows(rows, state), x, dy)[0]

        def theirs(x: Tensor = x, dy: Tensor = dy) -> Tensor:
            state = padded.plan(x, _SEED)
            rows = padded.shuffle(x, state)
            return torch.autograd.grad(padded.unshuffle(rows, state), x, dy)[0]

        sides = {_OURS: ours, _OTHER: theirs}
        sent[count] = {}
        for name, step in sides.items():
            with counting_traffic() as traffic:
                gradient = step()
            sent[count][name] = traffic.sent
            require_equal(f"{name}: gradient of the identity", [gradient], [dy], 0.0)
        times[count] = alternate_together(
            {**sides, _BARE: _bare_exchanges(x.detach())}, device, plan
        )
    return {"checks": checks, "times": times, "sent": sent}


def _bare_exchanges(rows: Tensor) -> Step:
    """Send what shuffle, unshuffle and their backward do: all rows but a W-th, four times."""
    world, rank = dist.get_world_size(), get_rank()
    sizes = [0 if r == rank else len(rows) // world for r in range(world)]
    sent = rows[: sum(sizes)].contiguous()
    received = torch.empty_like(sent)

    def step() -> None:
        for _ in range(4):
            dist.all_to_all_single(received, sent, sizes, sizes)

    return step


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
