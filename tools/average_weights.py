#!/usr/bin/env python3
"""Average finished checkpoints: SWA after the fact, with population statistics of its own.

    python tools/average_weights.py output/run/model_0000749.pth output/run/model_0000999.pth \\
        --config-file configs/shapes/retinanet_bn_row1.yaml --output output/run/model_averaged.pth

Parameters are averaged in float32. The BatchNorm statistics are estimated for the averaged weights,
on what TEST.PRECISE_BN of the config describes, and all else is the last checkpoint's. The result
holds the model alone; evaluate it by train_net.py --eval-only MODEL.WEIGHTS. Any config key can be
set at the end of the command, as KEY VALUE. Runs in one process.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from itertools import takewhile
from typing import Any

# detectron2 uses what recent versions of torch deprecate: nothing a user of this tool can change
warnings.filterwarnings("ignore", category=FutureWarning, module="torch|detectron2|fvcore")

from rethinking_bn.command_line import add_import, require_detectron2  # noqa: E402

if __name__ == "__main__":
    require_detectron2(__doc__ or "")

import rethinking_bn.engine  # noqa: E402, F401, isort: skip  # says so where detectron2 is missing
import torch  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from detectron2.utils.logger import setup_logger  # noqa: E402

from rethinking_bn.averaging import AveragedWeights  # noqa: E402
from rethinking_bn.checkpoint import read_weights  # noqa: E402
from rethinking_bn.engine import Checkpointer, load_config, run_population_training  # noqa: E402
from rethinking_bn.engine.check_config import check_data_sets  # noqa: E402
from rethinking_bn.engine.load_config import use_available_device  # noqa: E402
from rethinking_bn.files import probe_folder, replace  # noqa: E402


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", metavar="A.pth", help="two or more")
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--output", required=True, metavar="C.pth")
    add_import(parser)
    args = parser.parse_intermixed_args(argv)
    words = args.checkpoints  # files, then KEY VALUE
    args.checkpoints = list(takewhile(lambda word: word.endswith((".pth", ".pkl")), words))
    args.opts = words[len(args.checkpoints) :]
    return args


def read_states(paths: list[str]) -> list[dict[str, torch.Tensor]]:
    """Return the checkpoints' models, on the CPU.

    Raises:
        ValueError: for fewer than two, and when keys or shapes are not those of the first.
        OSError: for a file that cannot be read.
    """
    if len(paths) < 2:
        raise ValueError(f"two or more checkpoints (.pth) are needed, got {len(paths)}")
    states = [read_weights(path) for path in paths]
    first = states[0]
    for path, state in zip(paths[1:], states[1:], strict=True):
        differing = {
            "missing": first.keys() - state.keys(),
            "added": state.keys() - first.keys(),
            "of another shape": {
                key for key in first.keys() & state.keys() if first[key].shape != state[key].shape
            },
        }
        said = [f"{what}: {_listed(keys)}" for what, keys in differing.items() if keys]
        if said:
            raise ValueError(f"{path} is not of the same model as {paths[0]}; {'; '.join(said)}")
    return states


def _listed(keys: set[str]) -> str:
    return ", ".join(sorted(keys)[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks for; return the exit status."""
    args = parse(argv)
    try:
        cfg: Any = load_config(args.config_file, args.opts, imports=args.imports)
        use_available_device(cfg)
        check_data_sets(cfg)
        states = read_states(args.checkpoints)
        model = build_model(cfg)
        lacking = {name for name, _ in model.named_parameters()} - states[0].keys()
        if lacking:
            raise ValueError(f"{args.checkpoints[0]} is not of this config: no {_listed(lacking)}")
        probe_folder(os.path.dirname(args.output) or ".", "--output")  # last: it makes the folder
    except (ValueError, OSError) as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        return 1
    setup_logger(name="rethinking_bn")
    logging.getLogger("fvcore").setLevel(logging.WARNING)
    averaged = AveragedWeights(model, "swa", statistics="copy")
    for path in args.checkpoints:
        Checkpointer(model).load(path, checkpointables=[])
        averaged.update(model)
    run_population_training(cfg, averaged.module)
    replace(args.output, lambda file: torch.save({"model": averaged.module.state_dict()}, file))
    print(f"the mean of {len(states)} checkpoints is in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
