#!/usr/bin/env python3
"""Evaluate the same weights by every choice of BatchNorm statistics, and compare.

Rows: the statistics stored in the weights, those of the exact population of
TEST.PRECISE_BN.DATASETS (or DATASETS.TRAIN), of the mini-batch at inference, and of each data set
in DATASETS.TEST; columns: the data sets in DATASETS.TEST (arXiv 2105.07576, Figure 5 and Table 4).

    python tools/statistics_matrix.py --config-file configs/shapes/retinanet_bn_2im.yaml \\
        MODEL.WEIGHTS output/shapes/retinanet_bn_2im/model_final.pth \\
        DATASETS.TEST "('shapes_val', 'shapes_val_contrast')"

TEST.PRECISE_BN.{NUM_ITER, IMS_PER_BATCH, TRANSFORMS, THAW} hold for every estimate: with THAW,
FrozenBatchNorm2d gets the statistics of the row, too. ``--resume`` takes the last checkpoint in
OUTPUT_DIR, not MODEL.WEIGHTS. The table also goes to OUTPUT_DIR/statistics_matrix.{json,png}.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from importlib.util import find_spec
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

from rethinking_bn.engine import Checkpointer, Trainer, run_population_training  # noqa: E402
from rethinking_bn.engine.launch import run, setup  # noqa: E402
from rethinking_bn.files import replace, write_json  # noqa: E402

Table = dict[str, dict[str, float]]  # {statistics: {column: AP}}


def main(args: argparse.Namespace) -> Table:
    """Run one rank; rank 0 prints and writes."""
    cfg = setup(args)
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR)
    weights = (args.resume and checkpointer.get_checkpoint_file()) or cfg.MODEL.WEIGHTS
    checkpointer.load(weights, checkpointables=[])
    stored = {name: buffer.clone() for name, buffer in model.named_buffers()}
    table: Table = {}
    for title, keys in rows(cfg):
        row = cfg.clone()
        row.defrost()
        row.merge_from_list(keys)
        if row.TEST.PRECISE_BN.ENABLED:
            run_population_training(row, model)
        table[title] = columns(row, Trainer.test(row, model))
        for name, buffer in model.named_buffers():
            buffer.copy_(stored[name])
    if comm.is_main_process():
        print(as_text(table))
        path = Path(cfg.OUTPUT_DIR, "statistics_matrix.json")
        write_json(path, {"weights": weights, "AP": table})
        plot(path.with_suffix(".png"), table)
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


def columns(cfg: CfgNode, results: dict[str, Any]) -> dict[str, float]:
    """Return the AP of every data set and task (empty on other ranks than 0)."""
    names = cfg.DATASETS.TEST
    sets = {names[0]: results} if len(names) == 1 else results
    found = {f"{name} {task}": aps["AP"] for name, r in sets.items() for task, aps in r.items()}
    return {column: 0.0 if math.isnan(ap) else ap for column, ap in found.items()}  # none found


def as_text(table: Table) -> str:
    """Return the table in Markdown."""
    heads = list(next(iter(table.values())))
    lines = [["statistics", *heads], ["---"] * (len(heads) + 1)]
    lines += [[title, *(f"{ap:.1f}" for ap in row.values())] for title, row in table.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plot(path: Path, table: Table) -> None:
    """Draw a group of bars per data set."""
    if find_spec("matplotlib") is None:
        return  # it is no requirement
    from matplotlib.figure import Figure

    heads = list(next(iter(table.values())))
    figure = Figure(figsize=(3 + 2 * len(heads), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(table)
    for i, (title, row) in enumerate(table.items()):
        axes.bar([x + i * width for x in range(len(heads))], list(row.values()), width, label=title)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(heads))], heads)
    axes.set_ylabel("AP")
    axes.legend(fontsize="small")
    replace(path, lambda aside: figure.savefig(aside, dpi=150, format="png"))


if __name__ == "__main__":
    assert __doc__ is not None
    # the command line is checked as that of a run which estimates a population
    run(main, __doc__, ["--eval-only", *sys.argv[1:], "TEST.PRECISE_BN.ENABLED", "True"])
