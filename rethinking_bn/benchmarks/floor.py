"""The time that no kernel can go below: bytes that must move over the memory's bandwidth."""

from __future__ import annotations

import torch

from .result import Table
from .timing import Plan, Spread, alternate, spread

# Forward: read x for the statistics; read x, write y. Backward: read dy and x for the sums; read dy
# and x, write dx.
PASSES = 8


def floor_table(nbytes: int, sides: dict[str, Spread], device: torch.device, plan: Plan) -> Table:
    """Compare forward and backward of a batch-normalising layer with the copy of its input.

    Args:
        nbytes: of the input.
        sides: name -> measured seconds.
    """
    source = torch.zeros(nbytes // 4, device=device)
    target = torch.empty_like(source)
    copied = spread(alternate({"copy": lambda: target.copy_(source)}, device, plan)["copy"]).median
    bandwidth = 2 * nbytes / copied
    floor = PASSES * nbytes / bandwidth
    rows: list[tuple[str | int | float, ...]] = [
        (name, value.median * 1e3, floor * 1e3, value.median / floor)
        for name, value in sides.items()
    ]
    title = (
        f"Floor: {PASSES} passes over {nbytes / 2**20:.1f} MiB at the {bandwidth / 1e9:.1f} GB/s "
        "of a copy (an input that fits a cache can go below)"
    )
    return Table(title, ("side", "ms", "floor ms", "times the floor"), rows)
