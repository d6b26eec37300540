#!/usr/bin/env python3
"""Write the plain BatchNorm weights of one domain of a checkpoint trained with MODEL.DOMAIN_BN.

The result loads wherever nn.BatchNorm2d's weights do, in detectron2's backbones for example:

    python tools/convert_checkpoint.py output/model_final.pth clean.pth --domain 0

detectron2's own RetinaNetHead with NORM BN has statistics per feature level; for it, the head's
shared ones are written once per level:

    python tools/convert_checkpoint.py output/model_final.pth clean.pth --domain 0 --levels 5

Weights only: no optimizer, no iteration. Needs no detectron2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from rethinking_bn.checkpoint import copy_to_levels, read_weights, select_domain
from rethinking_bn.files import replace


def convert(source: Path, target: Path, domain: int, levels: int = 0) -> int:
    """Write the converted checkpoint; return the number of its entries.

    Raises:
        OSError: for a file that cannot be read or written.
        ValueError: for a file that is no checkpoint, or has no such domain.
    """
    weights = select_domain(read_weights(source), domain)
    if levels:
        weights = copy_to_levels(weights, levels)
    replace(target, lambda path: torch.save({"model": weights}, path))
    return len(weights)


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks for; return the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a .pth file with domains")
    parser.add_argument("target", type=Path, help="the .pth file to write")
    parser.add_argument("--domain", type=int, required=True, help="from 0, in DATASETS' order")
    parser.add_argument("--levels", type=int, default=0, help="of detectron2's RetinaNetHead")
    args = parser.parse_args(arguments)
    try:
        number = convert(args.source, args.target, args.domain, args.levels)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{args.target}: {number} tensors of domain {args.domain}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
