#!/usr/bin/env python3
"""Write the weights of a trained model for stock detectron2.

detectron2's own RetinaNetHead with NORM BN has statistics for each feature level and one affine.
For a detector of row 1 or 3 of Table 5 (shared statistics), with its 5 levels:

    python tools/convert_checkpoint.py output/model_final.pth stock.pth --levels 5

Rows 2 and 4 have that layout: the tool says so. Rows 5 and 6, with an affine for each level, are
refused. Of a detector with domains in its data (MODEL.DOMAIN_BN), the plain BatchNorm weights of
one domain, which load wherever nn.BatchNorm2d's do, and with the levels of a RetinaNet's head:

    python tools/convert_checkpoint.py output/model_final.pth clean.pth --domain 0
    python tools/convert_checkpoint.py output/model_final.pth clean.pth --domain 0 --levels 5

Weights only: no optimizer, no iteration. Needs no detectron2. See docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

# of detectron2, which is imported where it is there: nothing a user of this tool can change
warnings.filterwarnings("ignore", category=FutureWarning, module="torch|detectron2|fvcore")
warnings.filterwarnings("ignore", message="pkg_resources")

import torch  # noqa: E402

from rethinking_bn.checkpoint import copy_to_levels, read_weights, select_domain  # noqa: E402
from rethinking_bn.command_line import at_least_one  # noqa: E402
from rethinking_bn.files import replace  # noqa: E402


def convert(source: Path, target: Path, domain: int | None, levels: int | None) -> str:
    """Write the converted checkpoint; return what is in it, in one line.

    Raises:
        OSError: for a file that cannot be read or written.
        ValueError: for a file that is no checkpoint, or cannot become what is asked for.
    """
    weights = read_weights(source)
    about = []
    if domain is not None:
        weights = select_domain(weights, domain)
        about.append(f" of domain {domain}")
    if levels is not None:
        before = list(weights)
        weights = copy_to_levels(weights, levels)
        about.append(f", statistics for {levels} levels")
        if list(weights) == before:
            about.append(" as they were: rows 2 and 4 load in stock detectron2 as they are")
    replace(target, lambda path: torch.save({"model": weights}, path))
    return f"{target}: {len(weights)} tensors{''.join(about)}"


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks for; return the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a checkpoint")
    parser.add_argument("target", type=Path, help="the .pth file to write")
    parser.add_argument("--domain", type=int, help="of the data, from 0, in DATASETS' order")
    parser.add_argument("--levels", type=at_least_one, help="of detectron2's RetinaNetHead")
    args = parser.parse_args(arguments)
    if args.domain is None and args.levels is None:
        parser.error("give --levels L, --domain D, or both")
    try:
        print(convert(args.source, args.target, args.domain, args.levels))
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
