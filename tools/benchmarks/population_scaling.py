"""One estimate of population statistics shared by several processes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.equality import ResultsDiffer, require_equal_state, tolerance_of
from benchmarks.options import Options
from benchmarks.processes import alternate_together
from benchmarks.result import Result
from benchmarks.timing import Plan
from rethinking_bn.distributed import get_rank
from rethinking_bn.population.estimate import estimate_population_statistics
from studies.environment import available_cores
from studies.processes import run_processes


def add_scaling(result: Result, options: Options) -> None:
    """Time W · k batches on one process, and k on each of W; a CPU thread each.

    Beside it the floor: W processes at once that each estimate from k batches of their own and
    have nothing to tell each other. More processes than cores are not tried: they could only share
    them.
    """
    cores = available_cores()
    worlds = (2,) if options.quick else tuple(w for w in (2, 4, 8) if w <= cores)
    if not worlds:
        result.skip("several processes", f"there is {cores} core")
    size, images, count = options.pick(quick=(64, 1, 1), cpu=(96, 2, 8), cuda=(96, 2, 8))
    for world in worlds:
        args = (size, images, count, options.plan(10.0))
        answer = run_processes(_measure, world, *args, expected=ResultsDiffer)[0]
        result.checks[f"{world} processes = one"] = answer["error"]
        times = answer["times"]
        case = f"{world * count} batches of resnet18, {images} x {size} x {size}, cpu"
        together = (f"{world} processes", times["all"])
        result.measure(case, together, ("one process", times["one"]))
        result.measure(case, together, (f"{world} that share nothing", times["apart"]))


def _measure(
    device: torch.device, size: int, images: int, count: int, plan: Plan
) -> dict[str, Any]:
    """Run on one rank: check and time both ways; rank 0 works alone while the others wait."""
    import torchvision

    rank, world = get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    together = torchvision.models.resnet18(num_classes=10).to(device).train()
    alone, apart = copy.deepcopy(together), copy.deepcopy(together)
    mine, _ = dist.new_subgroups(1)  # this rank and no other
    batches = [
        [torch.randn(images, 3, size, size, device=device) * (r + 1) for _ in range(count)]
        for r in range(world)
    ]
    everything = [batch for of_rank in batches for batch in of_rank]

    def with_all() -> None:
        estimate_population_statistics(together, batches[rank], count, progress=False)

    def with_one() -> None:
        if rank == 0:
            estimate_population_statistics(
                alone, everything, len(everything), group=mine, progress=False
            )

    def with_nobody() -> None:
        estimate_population_statistics(apart, batches[rank], count, group=mine, progress=False)

    with_all()
    with_one()
    error = 0.0
    if rank == 0:
        states = [
            {k: v for k, v in m.state_dict().items() if "running" in k} for m in (together, alone)
        ]
        what = f"statistics of {world} processes and of one"
        error = require_equal_state(what, states[0], states[1], tolerance_of(torch.float32))
    return {
        "error": error,
        "times": alternate_together(
            {"all": with_all, "one": with_one, "apart": with_nobody}, device, plan
        ),
    }
