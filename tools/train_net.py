#!/usr/bin/env python3
"""Train or evaluate a detector.

Train RetinaNet on the generated shapes data set, on the CPU:

    python tools/train_net.py --config-file configs/shapes/retinanet_bn_row1.yaml

Train row 1 of Table 5 on COCO with 8 GPUs, then train row 2's population statistics on its
weights and evaluate (the result is saved as OUTPUT_DIR/model_population.pth):

    python tools/train_net.py --config-file configs/retinanet_bn_row1.yaml --num-gpus 8
    python tools/train_net.py --config-file configs/retinanet_bn_row2.yaml --num-gpus 8 \\
        --eval-only MODEL.WEIGHTS output/retinanet_bn_row1/model_final.pth

``--resume`` continues from the last checkpoint in OUTPUT_DIR. Any config key can be set at the end
of the command, as KEY VALUE. Without a GPU, ``--num-gpus N`` stands for N processes on the CPU.
Under torchrun, leave out ``--num-gpus``:

    torchrun --nproc-per-node 8 tools/train_net.py --config-file configs/retinanet_bn_row1.yaml
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

# detectron2 uses what recent versions of torch deprecate: nothing a user of this tool can change
warnings.filterwarnings("ignore", category=FutureWarning, module="torch|detectron2|fvcore")
warnings.filterwarnings("ignore", message="pkg_resources")

from rethinking_bn.command_line import require_detectron2  # noqa: E402

if __name__ == "__main__":
    require_detectron2(__doc__ or "")

import rethinking_bn.engine  # noqa: E402, F401, isort: skip  # says so where detectron2 is missing
from detectron2.evaluation import verify_results  # noqa: E402
from detectron2.utils import comm  # noqa: E402

from rethinking_bn.engine import Checkpointer, Trainer, run_population_training  # noqa: E402
from rethinking_bn.engine.launch import run, setup  # noqa: E402


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate a model, after training its population statistics if the config asks for that."""
    cfg = setup(args)
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    if cfg.TEST.PRECISE_BN.ENABLED:
        run_population_training(cfg, model)
        checkpointer.save_untagged("model_population")
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def train(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train a model, or go on training it."""
    trainer = Trainer(setup(args))
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Run one rank."""
    return evaluate(args) if args.eval_only else train(args)


if __name__ == "__main__":
    assert __doc__ is not None
    run(main, __doc__)
