#!/usr/bin/env python3
"""Measure this project beside what one would otherwise run.

Everything, in ten minutes and more on two cores that nobody else uses:

    python tools/benchmark.py all

The layers over feature levels, and the RetinaNet head with them, eager and compiled, on the GPU:

    python tools/benchmark.py level-norm head --device cuda

Each comparison first checks that both sides compute the same outputs, gradients and running
statistics, and stops if not. Then it times them in turns, on the CPU with one thread by process
time, and prints medians with quartiles, and ratios. The same goes to
OUTPUT/benchmark_<comparisons>_<device>.md and .json, with versions and hardware. ``--quick`` uses
toy sizes to see that everything works: its times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

import torch

# a checkout is enough: the package need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# detectron2 uses what recent versions of torch deprecate: nothing a user of this tool can change
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="torch.meshgrid")
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # for the processes started here

from benchmarks import COMPARISONS, Options, ResultsDiffer, compare  # noqa: E402
from benchmarks.result import write_report  # noqa: E402
from machine.environment import describe_environment  # noqa: E402
from rethinking_bn.files import probe_folder  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the checked command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(COMPARISONS)
    parser.add_argument(
        "comparison", nargs="+", choices=[*COMPARISONS, "all"], help=f"{names}, or all",
        metavar="COMPARISON",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=Path("output/benchmark"), metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no usable GPU here")
    try:
        probe_folder(args.output, "--output")
    except OSError as error:
        parser.error(str(error))
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status."""
    args = parse(arguments)
    options = Options(torch.device(args.device), args.quick)
    environment = {**describe_environment(options.device), "threads": 1}
    print(", ".join(f"{key}: {value}" for key, value in environment.items()), end="\n\n")
    if args.quick:
        print("--quick: toy sizes, the times mean nothing\n")
    names = list(COMPARISONS) if "all" in args.comparison else args.comparison
    results = []
    for name in names:
        try:
            results.append(compare(name, options))
        except ResultsDiffer as error:
            print(f"{name}: the sides differ, so nothing is timed: {error}", file=sys.stderr)
            return 1
        print(results[-1].as_markdown(), flush=True)
    report = {"quick": args.quick, "environment": environment}
    name = f"benchmark_{'_'.join(args.comparison)}_{args.device}"
    print(f"written to {write_report(args.output, name, report, results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
