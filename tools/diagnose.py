#!/usr/bin/env python3
"""Say what is wrong with the BatchNorm of a detectron2 model, and what to do about it.

Of a trained model, on batches of its training (a line for each cause, the worst first, or
every layer with ``--verbose``; diagnosis.json and diagnosis.png
go to OUTPUT_DIR):

    python tools/diagnose.py --config-file configs/shapes/retinanet_bn_row3.yaml \\
        MODEL.WEIGHTS output/shapes/retinanet_bn_row3/model_final.pth

Before training and without data, what every norm layer of a config will do on 8 GPUs:

    python tools/diagnose.py --config-file configs/retinanet_bn_row3.yaml --plan --num-gpus 8

``--strict`` exits with status 1 on a severe finding or, with ``--plan``, a warning. ``--target``
names a registered data set of another domain to judge the statistics for.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings

warnings.filterwarnings("ignore", category=FutureWarning, module="torch|detectron2|fvcore")

from rethinking_bn.command_line import require_detectron2  # noqa: E402

if __name__ == "__main__":
    require_detectron2(__doc__ or "")

import rethinking_bn.engine  # noqa: E402, F401, isort: skip  # says so where detectron2 is missing
import torch  # noqa: E402
from detectron2.utils import comm  # noqa: E402

from rethinking_bn.engine import Checkpointer, Trainer, load_config, run_diagnosis  # noqa: E402
from rethinking_bn.engine.launch import argument_parser, run, setup  # noqa: E402
from rethinking_bn.engine.norm_plan import make_plan  # noqa: E402


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this tool to detectron2's."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--plan", action="store_true", help="no data, no weights: the layers")
    parser.add_argument("--strict", action="store_true", help="exit 1 on a severe finding")
    parser.add_argument("--verbose", action="store_true", help="every layer, not every cause")
    parser.add_argument("--batches", type=int, default=50, help="per process (default: 50)")
    parser.add_argument("--target", default="", help="a data set of another domain")
    parser.set_defaults(eval_only=True, diagnosing=True)  # OUTPUT_DIR stays free for a training


def diagnose(args: argparse.Namespace) -> int:
    """Run one rank; return how many findings are severe."""
    cfg = setup(args)
    model = Trainer.build_model(cfg)
    Checkpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
        cfg.MODEL.WEIGHTS, resume=args.resume
    )
    diagnosis = run_diagnosis(cfg, model, args.batches, target=args.target)
    if comm.is_main_process():
        print(diagnosis.as_text(verbose=args.verbose))
        diagnosis.to_json(os.path.join(cfg.OUTPUT_DIR, "diagnosis.json"))
        picture = "diagnosis.png"
        try:
            diagnosis.plot(os.path.join(cfg.OUTPUT_DIR, picture))
        except ImportError:
            picture = "no picture, as matplotlib is not installed"
        print(f"written to {cfg.OUTPUT_DIR}: diagnosis.json, {picture}")
    if args.strict and diagnosis.severe:
        sys.exit(1)
    return len(diagnosis.severe)


def main() -> None:
    """Read the command line."""
    parser = argument_parser(__doc__ or "")
    add_options(parser)
    args = parser.parse_args()
    try:
        if args.batches < 2:
            raise ValueError(f"--batches must be at least 2, got {args.batches}")
        if not args.plan:
            run(diagnose, __doc__ or "", add_options=add_options)
            return
        with torch.no_grad():
            cfg = load_config(args.config_file, args.opts, imports=args.imports)
            plan = make_plan(cfg, args.num_gpus)
    except (ValueError, OSError) as error:
        print(f"diagnose.py: error: {error}", file=sys.stderr)
        sys.exit(1)
    print(plan if plan.warnings else f"{plan}\nno mistake found")
    if args.strict and plan.warnings:
        sys.exit(1)


if __name__ == "__main__":
    main()
