#!/usr/bin/env python3
"""Evaluate the same weights by every choice of BatchNorm statistics, and compare.

Rows: the statistics stored in the weights, those of the exact population of
TEST.PRECISE_BN.DATASETS (or DATASETS.TRAIN), of the mini-batch at inference, and of each data set
in DATASETS.TEST; columns: AP, AP50 and AP75 on the data sets in DATASETS.TEST (arXiv 2105.07576,
Figure 5 and Table 4).

    python tools/statistics_matrix.py --config-file configs/shapes/retinanet_bn_2im.yaml \\
        MODEL.WEIGHTS output/shapes/retinanet_bn_2im/model_final.pth \\
        DATASETS.TEST "('shapes_val', 'shapes_val_contrast')"

TEST.PRECISE_BN.{NUM_ITER, IMS_PER_BATCH, TRANSFORMS, THAW} hold for every estimate: with THAW,
FrozenBatchNorm2d gets the statistics of the row, too. ``--resume`` takes the last checkpoint in
OUTPUT_DIR, not MODEL.WEIGHTS. The table also goes to OUTPUT_DIR/statistics_matrix.json.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from pathlib import Path
from typing import Any

# detectron2 uses what recent versions of torch deprecate: nothing a user of this tool can change
warnings.filterwarnings("ignore", category=FutureWarning, module="torch|detectron2|fvcore")

from rethinking_bn.command_line import require_detectron2  # noqa: E402

if __name__ == "__main__":
    require_detectron2(__doc__ or "")

import rethinking_bn.engine  # noqa: E402, F401, isort: skip  # says so where detectron2 is missing
from detectron2.config import CfgNode  # noqa: E402
from detectron2.utils import comm  # noqa: E402
from torch import nn  # noqa: E402

from rethinking_bn.engine import Checkpointer, Trainer, run_population_training  # noqa: E402
from rethinking_bn.engine.launch import run, setup  # noqa: E402
from rethinking_bn.files import write_json  # noqa: E402

METRICS = ("AP", "AP50", "AP75")

Table = dict[str, dict[str, dict[str, float]]]  # {statistics: {column: {metric: percent}}}


def main(args: argparse.Namespace) -> Table:
    """Run one rank; rank 0 prints and writes."""
    cfg = setup(args)
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR)
    weights = (args.resume and checkpointer.get_checkpoint_file()) or cfg.MODEL.WEIGHTS
    checkpointer.load(weights, checkpointables=[])
    table = measure(cfg, model, rows(cfg))
    if comm.is_main_process():
        print(as_text(table))
        path = Path(cfg.OUTPUT_DIR, "statistics_matrix.json")
        write_json(path, {"weights": weights, "statistics": table})
    return table


def measure(cfg: CfgNode, model: nn.Module, rows: list[tuple[str, list[Any]]]) -> Table:
    """Evaluate a model by the statistics of each row, and give it its own back."""
    stored = {name: buffer.clone() for name, buffer in model.named_buffers()}
    table: Table = {}
    for title, keys in rows:
        row = cfg.clone()
        row.defrost()
        row.merge_from_list(keys)
        if row.TEST.PRECISE_BN.ENABLED:
            run_population_training(row, model)
        table[title] = columns(row, Trainer.test(row, model))
        for name, buffer in model.named_buffers():
            buffer.copy_(stored[name])
    return table


def rows(cfg: CfgNode) -> list[tuple[str, list[Any]]]:
    """Return the title of every row and the keys that it sets."""
    on, off = (["TEST.PRECISE_BN.ENABLED", value, "TEST.STATISTICS"] for value in (True, False))
    source = tuple(cfg.TEST.PRECISE_BN.DATASETS or cfg.DATASETS.TRAIN)
    found: list[Any] = [("as stored", [*off, "population"]), ("mini-batch", [*off, "batch"])]
    for names in (source, *((name,) for name in cfg.DATASETS.TEST if (name,) != source)):
        keys: list[Any] = [*on, "population", "TEST.PRECISE_BN.DATASETS", names]
        found.append((f"population of {', '.join(names)}", keys))
    return found


def columns(cfg: CfgNode, results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the metrics of every data set and task (empty on other ranks than 0)."""
    names = cfg.DATASETS.TEST
    sets = {names[0]: results} if len(names) == 1 else results
    return {
        f"{name} {task}": {m: 0.0 if math.isnan(aps[m]) else aps[m] for m in METRICS}  # none found
        for name, tasks in sets.items()
        for task, aps in tasks.items()
    }


def as_text(table: Table) -> str:
    """Return the table in Markdown."""
    heads = [f"{column} {metric}" for column in next(iter(table.values())) for metric in METRICS]
    lines = [["statistics", *heads], ["---"] * (len(heads) + 1)]
    for title, row in table.items():
        values = [aps[metric] for aps in row.values() for metric in METRICS]
        lines.append([title, *(f"{value:.1f}" for value in values)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    assert __doc__ is not None
    # the command line is checked as that of a run which estimates a population
    run(main, __doc__, ["--eval-only", *sys.argv[1:], "TEST.PRECISE_BN.ENABLED", "True"])
