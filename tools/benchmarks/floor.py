"""The time that no kernel can go below: bytes that must move, and memory that must be had."""

from __future__ import annotations

import torch

from benchmarks.result import Table
from benchmarks.timing import Plan, Spread, alternate, spread

# Forward: read x for the statistics; read x, write y. Backward: read dy and x for the sums; read dy
# and x, write dx.
PASSES = 8


def floor_table(nbytes: int, sides: dict[str, Spread], device: torch.device, plan: Plan) -> Table:
    """Compare forward and backward of a batch-normalising layer with the copy of its input.

    The floor is the bytes at the speed of a copy, and what it costs beyond a copy to write two
    tensors, y and dx, into memory that was just allocated: on a CPU, where large tensors are paged
    in anew each time, that is most of it.

    Args:
        nbytes: of the input.
        sides: name -> measured seconds.
    """
    source = torch.ones(nbytes // 4, device=device)  # zeros would all be one page, read from cache
    target = torch.empty_like(source)
    steps = {"copy": lambda: target.copy_(source), "clone": lambda: source.clone()}
    times = {name: spread(t).median for name, t in alternate(steps, device, plan).items()}
    moved = PASSES * times["copy"] / 2
    fresh = 2 * max(times["clone"] - times["copy"], 0.0)
    floor = moved + fresh
    rows: list[tuple[str | int | float, ...]] = [
        (name, value.median * 1e3, floor * 1e3, value.median / floor)
        for name, value in sides.items()
    ]
    speed = 2 * nbytes / times["copy"] / 1e9
    title = (
        f"Floor: {PASSES} passes over {nbytes / 2**20:.1f} MiB at the {speed:.1f} GB/s of a copy, "
        f"{moved * 1e3:.3g} ms (an input that fits a cache can go below), and two newly allocated "
        f"tensors, {fresh * 1e3:.3g} ms"
    )
    return Table(title, ("side", "ms", "floor ms", "times the floor"), rows)
