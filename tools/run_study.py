#!/usr/bin/env python3
"""Run one of the paper's findings at laptop scale; needs no detectron2 and downloads nothing.

What there is:

    python tools/run_study.py list

One detection head of the paper's Table 5, the same weights by three kinds of statistics:

    python tools/run_study.py rows

The whole table: three trainings of heads, GN, and no norm:

    python tools/run_study.py rows --all

Says first how long it takes here (rows), prints each value as soon as it is known, then a table
beside the paper's, and writes it as JSON, with a plot, to OUTPUT/NAME. Ctrl-C keeps what was
finished, and running the same command again goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

# a checkout is enough: the package need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rethinking_bn.files import probe_folder  # noqa: E402
from studies import STUDIES  # noqa: E402
from studies.runner import run_study  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the checked command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=["list", *STUDIES], metavar="NAME", help="or list")
    parser.add_argument("--output", type=Path, default=Path("studies_output"), metavar="DIR")
    parser.add_argument("--seeds", type=int, metavar="N", help="run seeds 0 to N - 1")
    parser.add_argument("--quick", action="store_true", help="a first look, one seed, in seconds")
    parser.add_argument("--all", action="store_true", help="rows: the whole table")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args(arguments)
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no usable GPU here")
    if args.name != "list":
        try:
            probe_folder(args.output, "--output")
        except OSError as error:
            parser.error(str(error))
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status."""
    args = parse(arguments)
    if args.name == "list":
        width = max(map(len, STUDIES))
        for study in STUDIES.values():
            print(f"{study.name:{width}}  {study.source}: {study.title}")
        return 0
    study = STUDIES[args.name]
    count = args.seeds or (1 if args.quick else study.seeds)
    folder = args.output / (f"{study.name}-quick" if args.quick else study.name)
    options = {"quick": args.quick, "everything": args.all, "device": torch.device(args.device)}
    try:
        run_study(study, folder, seeds=range(count), **options)
    except KeyboardInterrupt:
        said = "interrupted: what was finished is kept, and the same command goes on from there"
        print(said, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
