"""This project measured beside what people use today: one comparison per module.

Every comparison checks that both sides compute the same before it times them in turns, in one
process or in one set of processes. ``tools/benchmark.py`` is the command line.
"""

from __future__ import annotations

import time
from importlib import import_module

import torch

from benchmarks.equality import ResultsDiffer
from benchmarks.result import Result
from benchmarks.timing import Options

__all__ = ["COMPARISONS", "Options", "Result", "ResultsDiffer", "compare"]

COMPARISONS = (
    *("level-norm", "head", "collectives", "shuffle"),
    *("precise-bn", "mabn", "averaging", "diagnosis"),
)


def compare(name: str, options: Options) -> Result:
    """Run one of COMPARISONS, with one thread on the CPU.

    Raises:
        ValueError: for an unknown name.
        ResultsDiffer: when the sides do not compute the same.
    """
    if name not in COMPARISONS:
        raise ValueError(f"unknown comparison {name!r}; there are {', '.join(COMPARISONS)}")
    threads, start = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)
    try:
        result: Result = import_module(f"benchmarks.{name.replace('-', '_')}").run(options)
    finally:
        torch.set_num_threads(threads)
    result.seconds = time.perf_counter() - start
    return result
