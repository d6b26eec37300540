"""This project measured beside what people use today: one comparison per module.

Every comparison checks that both sides compute the same before it times them in turns, in one
process or in one set of processes. ``tools/benchmark.py`` is the command line.
"""

from __future__ import annotations

import time
from importlib import import_module

from benchmarks.equality import ResultsDiffer
from benchmarks.options import Options
from benchmarks.result import Measurement, Result, Table

__all__ = ["COMPARISONS", "Measurement", "Options", "Result", "ResultsDiffer", "Table", "compare"]

#: name of each comparison -> its module
COMPARISONS = {
    "level-norm": "level_norm",
    "head": "head",
    "collectives": "collectives",
    "shuffle": "shuffle",
    "precise-bn": "precise_bn",
    "mabn": "mabn",
    "averaging": "averaging",
    "dispatch": "dispatch",
}


def compare(name: str, options: Options) -> Result:
    """Run one comparison.

    Args:
        name: a key of COMPARISONS.

    Raises:
        ValueError: for an unknown name.
        ResultsDiffer: when the sides do not compute the same.
    """
    if name not in COMPARISONS:
        raise ValueError(f"unknown comparison {name!r}; there are {', '.join(COMPARISONS)}")
    start = time.perf_counter()
    result: Result = import_module(f".{COMPARISONS[name]}", __name__).run(options)
    result.seconds = time.perf_counter() - start
    return result
