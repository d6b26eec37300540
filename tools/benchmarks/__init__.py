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

__all__ = [
    "COMPARISONS",
    "ON_A_GPU",
    "Measurement",
    "Options",
    "Result",
    "ResultsDiffer",
    "Table",
    "compare",
]

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
    "diagnosis": "diagnosis",
}

#: likewise what needs a GPU, and no comparison on the CPU
ON_A_GPU = {"gpu": "gpu"}


def compare(name: str, options: Options) -> Result:
    """Run one comparison.

    Args:
        name: a key of COMPARISONS or ON_A_GPU.

    Raises:
        ValueError: for an unknown name.
        ResultsDiffer: when the sides do not compute the same.
    """
    modules = COMPARISONS | ON_A_GPU
    if name not in modules:
        raise ValueError(f"unknown comparison {name!r}; there are {', '.join(modules)}")
    start = time.perf_counter()
    result: Result = import_module(f".{modules[name]}", __name__).run(options)
    result.seconds = time.perf_counter() - start
    return result
