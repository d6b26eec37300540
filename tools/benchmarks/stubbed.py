"""Host time of the Triton path without a GPU: everything but the launches themselves."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks.contenders import Contender
from benchmarks.options import Options, missing
from benchmarks.result import Cell, Result, Table
from benchmarks.timing import Step, alternate, spread

#: seconds that Triton's Python side takes for a launch up to the driver's call
LAUNCH = 16e-6
_KERNELS = {
    "forward": ("moments", "merge", "normalize"),
    "backward": ("gradient_sums", "merge_sums", "input_gradient"),
    "moving": ("advance", "average", "scale_and_shift", "combine"),
}


@contextmanager
def stubbed_launches() -> Iterator[list[str]]:
    """Take the kernels' path for CPU tensors and launch nothing; collect what would have been.

    The values that come out are whatever was in memory.
    """
    from rethinking_bn.numerics.triton import backward, choice, forward, moving

    launched: list[str] = []

    class Stub:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.name)
            return lambda *args, **kwargs: None

    modules = {"forward": forward, "backward": backward, "moving": moving}
    with ExitStack() as stack:
        for module, names in _KERNELS.items():
            for name in names:
                stack.enter_context(patch.object(modules[module], name, Stub(name)))
        stack.enter_context(patch.object(choice, "_triton", lambda: (None, True)))
        stack.enter_context(patch.dict(os.environ, RETHINKING_BN_KERNELS="triton"))
        yield launched


def add_stubbed(
    result: Result,
    concat: Contender,
    sides: Mapping[str, Contender],
    launches: Mapping[str, int],
    options: Options,
) -> None:
    """Add the table: launches of a step, its host time with :data:`LAUNCH` each, and the ratio.

    Args:
        launches: of the sides that launch nothing themselves.
    """
    reason = missing("triton")
    if reason or options.device.type != "cpu":
        return result.skip("launches stubbed out", reason or "for the CPU")
    with stubbed_launches() as launched:
        steps: dict[str, Step] = {concat.name: concat.step}
        steps |= {name: side.step for name, side in sides.items()}
        times = alternate(steps, options.device, options.plan(4.0), clock=time.process_time)
        base = spread(times[concat.name]).median
        rows: list[tuple[Cell, ...]] = []
        for name, step in steps.items():
            launched.clear()
            step()
            count = launches.get(name, len(launched))
            host = spread(times[name]).median + LAUNCH * count
            rows.append((name, count, host * 1e6, host / base))
    unit = f"µs with {LAUNCH * 1e6:.0f} a launch"
    columns = ("Triton kernels", "launches", unit, "beside concatenate")
    result.tables.append(Table("Host time with the launches stubbed out", columns, rows))
