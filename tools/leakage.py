#!/usr/bin/env python3
"""Train a BN head and a shuffle head, and evaluate each by population and by mini-batch statistics.

A head whose batches hold the RoIs of one image learns to read the image from its batch: it does
well when inference normalises by the one image, too, and badly with population statistics.
Shuffled RoIs carry no such information (section 6 of arXiv 2105.07576, Tables 3 and 6).

On the generated shapes data set, with two processes and one image each (without a GPU, they run on
the CPU), every number from one seed:

    python tools/leakage.py --num-gpus 2 SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.005 \\
        SOLVER.MAX_ITER 3000 SOLVER.STEPS "(2400,)" SEED 1 OUTPUT_DIR output/leakage

``--config-file`` names the config of the BN head; the default is
shapes/mask_rcnn_bn_head_1im.yaml, whose MODEL.ROI_HEADS.NORM_IMAGES 1 makes normalisation batches
of one image however many images a process has; bccd/faster_rcnn_bn_head_1im.yaml is that on blood
cells, without masks. The shuffle head differs in the two ``MODEL.ROI_{BOX,MASK}_HEAD.NAME`` only.
Weights, logs and the table go to OUTPUT_DIR. ``--resume`` goes on with the heads' last checkpoints
there; there is no ``--eval-only``.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from typing import Any

# detectron2 uses what recent versions of torch deprecate: nothing a user of this tool can change
warnings.filterwarnings("ignore", category=FutureWarning, module="torch|detectron2|fvcore")
warnings.filterwarnings("ignore", message="pkg_resources")

from rethinking_bn.command_line import argument_parser, require_detectron2  # noqa: E402

if __name__ == "__main__":
    require_detectron2(__doc__ or "")

import rethinking_bn.engine  # noqa: E402, F401, isort: skip  # says so where detectron2 is missing
from detectron2.config import CfgNode  # noqa: E402
from detectron2.utils import comm  # noqa: E402

from rethinking_bn import get_config_file  # noqa: E402
from rethinking_bn.engine import Trainer  # noqa: E402
from rethinking_bn.engine.launch import run, setup  # noqa: E402
from rethinking_bn.files import replace  # noqa: E402

DEFAULT = ("--config-file", get_config_file("shapes/mask_rcnn_bn_head_1im.yaml"))
HEADS = {
    "BN": ("NormBoxHead", "NormMaskHead"),
    "BN + shuffle": ("ShuffleBNBoxHead", "ShuffleBNMaskHead"),
}
STATISTICS = {"population": "BN", "mini-batch": "BatchStatBN"}

Row = tuple[str, str, str, str]


def with_keys(cfg: CfgNode, *keys_and_values: object) -> CfgNode:
    """Return a copy of a config with some keys set."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(list(keys_and_values))
    return cfg


def cells(results: dict[str, Any]) -> tuple[str, str]:
    """Return box and mask AP as text; "" for what the model has no head for."""
    box, mask = (f"{results[k]['AP']:.1f}" if k in results else "" for k in ("bbox", "segm"))
    return box, mask


def train_and_evaluate(cfg: CfgNode, head: str, resume: bool) -> tuple[int, list[Row]]:
    """Train with one kind of head and evaluate both ways; return the run seed and the rows."""
    box, mask = HEADS[head]
    cfg = with_keys(cfg, "MODEL.ROI_BOX_HEAD.NAME", box, "MODEL.ROI_MASK_HEAD.NAME", mask)
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, box)
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    trainer = Trainer(with_keys(cfg, "DATASETS.TEST", ()))  # evaluated below
    trainer.resume_or_load(resume=resume)
    trainer.train()
    model = trainer.model.module if comm.get_world_size() > 1 else trainer.model
    trained = model.state_dict()
    rows = []
    for statistics, norm in STATISTICS.items():
        keys = ("MODEL.ROI_BOX_HEAD.NORM", norm, "MODEL.ROI_MASK_HEAD.NORM", norm)
        model = Trainer.build_model(with_keys(cfg, *keys))
        model.load_state_dict(trained)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            rows.append((head, statistics, *cells(results)))
    return trainer.run_seed, rows


def main(args: argparse.Namespace) -> None:
    """Run one rank; the main one prints the table and writes it to OUTPUT_DIR/leakage.md."""
    cfg = setup(args)
    ranks, images = comm.get_world_size(), cfg.SOLVER.IMS_PER_BATCH
    lines = ["| head norm | statistics at inference | seed | box AP | mask AP |", "|---" * 5 + "|"]
    for head in HEADS:
        seed, rows = train_and_evaluate(cfg, head, args.resume)
        lines += [f"| {h} | {s} | {seed} | {box} | {mask} |" for h, s, box, mask in rows]
    lines += [
        "",
        f"{cfg.SOLVER.MAX_ITER} iterations of {images} images on {ranks} process(es), "
        f"NORM_IMAGES {cfg.MODEL.ROI_HEADS.NORM_IMAGES}",
    ]
    if comm.is_main_process():
        text = "\n".join(lines) + "\n"
        path = os.path.join(cfg.OUTPUT_DIR, "leakage.md")
        replace(path, lambda aside: aside.write_text(text, encoding="utf-8"))
        print(text, end="")


if __name__ == "__main__":
    assert __doc__ is not None
    if argument_parser(__doc__).parse_known_args()[0].eval_only:
        sys.exit("leakage.py: error: --eval-only: this tool evaluates what it trains; leave it out")
    # the first --config-file gives way to one on the command line
    run(main, __doc__, [*DEFAULT, *sys.argv[1:]])
