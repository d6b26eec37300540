#!/usr/bin/env python3
"""Make Table 5 of arXiv 2105.07576 from trained RetinaNets: all rows, and a picture of them.

    for seed in 0 1 2; do for head in bn_row1 bn_row3 bn_row6 gn no_norm; do
      python tools/train_net.py --config-file configs/bccd/retinanet_$head.yaml SEED $seed \\
        OUTPUT_DIR output/bccd/retinanet_${head}_$seed
    done; done
    python tools/table_5.py output/bccd --configs bccd

Rows 2, 4 and 5 are the weights of rows 1, 3 and 6 with other statistics. Every row is evaluated by
its moving averages, by the exact population and by each test image's own statistics, where these
differ from another row's. What is missing in the folder is left out; the table (mean and deviation
over the seeds) and the picture go to table_5.{json,md,png} there, and a second run measures only
what is new.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

# detectron2 uses what recent versions of torch deprecate: nothing a user of this tool can change
warnings.filterwarnings("ignore", category=FutureWarning, module="torch|detectron2|fvcore")

from rethinking_bn.command_line import require_detectron2  # noqa: E402

if __name__ == "__main__":
    require_detectron2(__doc__ or "")

import rethinking_bn.engine  # noqa: E402, F401, isort: skip  # says so where detectron2 is missing
from rethinking_bn import get_config_file  # noqa: E402
from rethinking_bn.engine import Checkpointer, Trainer, load_config  # noqa: E402
from rethinking_bn.engine.checks import check_data_sets  # noqa: E402
from rethinking_bn.engine.load_config import use_available_device  # noqa: E402
from rethinking_bn.files import read_json, replace, write_json  # noqa: E402
from statistics_matrix import measure, rows  # noqa: E402

AGREE, DISAGREE, NO_BATCH = "training and inference agree", "they disagree", "no batch"
_LEVEL, _TOGETHER = (f"the same weights, used {how}" for how in ("level by level", "all together"))
# row: (its config, that of its training, the paper's AP, kind, what it is in a picture)
ROWS = {
    "1": ("bn_row1", "bn_row1", 39.1, AGREE, "row 1: all levels together in training and use"),
    "2": ("bn_row2", "bn_row1", 2.1, DISAGREE, f"row 2: {_LEVEL}"),
    "4": ("bn_row4", "bn_row3", 39.1, AGREE, "row 4: level by level in training and use"),
    "3": ("bn_row3", "bn_row3", 34.1, DISAGREE, f"row 3: {_TOGETHER}"),
    "6": ("bn_row6", "bn_row6", 39.2, AGREE, "row 6: as row 4, each level with its affine"),
    "5": ("bn_row5", "bn_row6", 35.5, DISAGREE, f"row 5: {_TOGETHER}"),
    "GN": ("gn", "gn", 39.5, NO_BATCH, "GroupNorm"),
    "no norm": ("no_norm", "no_norm", 38.7, NO_BATCH, "no norm"),
}
COLUMNS = ("moving averages", "exact population", "mini-batch")

Found = dict[str, dict[str, dict[str, float]]]  # {row: {column: {seed: AP}}}


def evaluate(folder: Path, configs: str, checkpoint: str) -> Found:
    """Measure what is not yet in the folder's table_5.json, and save it there after each row."""
    known: dict[str, Found] = read_json(folder / "table_5.json") or {}
    found = known.setdefault(checkpoint, {})
    for row, (config, trained, *_) in ROWS.items():
        for weights in sorted(folder.glob(f"retinanet_{trained}_*/{checkpoint}")):
            seed = weights.parent.name.rpartition("_")[2]
            if any(seed in column for column in found.get(row, {}).values()):
                continue
            keys = ["MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", str(folder / "evaluation")]
            cfg = load_config(get_config_file(f"{configs}/retinanet_{config}.yaml"), keys)
            use_available_device(cfg)
            check_data_sets(cfg)
            model = Trainer.build_model(cfg)
            Checkpointer(model).load(cfg.MODEL.WEIGHTS, checkpointables=[])
            stored, batch, population, *_ = rows(cfg)
            wanted = dict(zip(COLUMNS, (stored, population, batch), strict=True))
            if config != trained:  # the others are those of the row that was trained
                wanted = {"exact population": population}
            elif "bn_" not in config:
                wanted = {"moving averages": stored}
            with redirect_stdout(StringIO()):  # pycocotools' tables
                table = measure(cfg, model, [(title, keys) for title, (_, keys) in wanted.items()])
            for column, (aps,) in ((title, row.values()) for title, row in table.items()):
                found.setdefault(row, {}).setdefault(column, {})[seed] = aps["AP"]
                print(f"row {row}, seed {seed}, {column}: {aps['AP']:.1f}", flush=True)
            write_json(folder / "table_5.json", known)
    if not found:
        raise ValueError(f"there is no {folder}/retinanet_HEAD_SEED/{checkpoint}")
    return found


def as_text(found: Found) -> str:
    """Return the table in Markdown, with the mean and the deviation over the seeds."""
    lines = ["| row | " + " | ".join(COLUMNS) + " | seeds | paper: COCO AP |", "|---" * 6 + "|"]
    for row in sorted(found):
        aps = [found[row].get(column, {}) for column in COLUMNS]
        seeds = ", ".join(sorted({seed for column in aps for seed in column}))
        cells = [_with_spread(list(column.values())) for column in aps]
        lines.append(f"| {row} | {' | '.join(cells)} | {seeds} | {ROWS[row][2]} |")
    return "\n".join(lines)


def _with_spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def plot(path: Path, found: Found, data: str) -> None:
    """Draw what was measured on some data (by the exact population), and beside it the paper's."""
    from matplotlib.figure import Figure  # slow to import

    colours = {AGREE: "tab:blue", DISAGREE: "tab:red", NO_BATCH: "tab:gray"}
    shown = [row for row in reversed(ROWS) if row in found]  # the first on top
    aps = [[*found[r].get(COLUMNS[1], found[r].get(COLUMNS[0], {})).values()] for r in shown]
    papers = [ROWS[row][2] for row in shown]
    spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in aps]
    sides = {f"here, {data}": [*map(statistics.mean, aps)], "the paper, COCO": papers}
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, (title, values), errors in zip(both, sides.items(), (spread, None), strict=True):
        kinds = [ROWS[row][3] for row in shown]
        bars = axes.barh(range(len(shown)), values, xerr=errors, color=[colours[k] for k in kinds])
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.set(title=f"{title}: box AP", xlim=(0, 1.18 * max(values)))
        axes.set_yticks(range(len(shown)), [ROWS[row][4] for row in shown])
        axes.spines[["top", "right"]].set_visible(False)
    handles = [axes.barh(0, 0, color=colour, label=kind) for kind, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    replace(path, lambda aside: figure.savefig(aside, dpi=110, format="png"))


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="holds retinanet_HEAD_SEED/CHECKPOINT")
    parser.add_argument("--configs", default="bccd", choices=("bccd", "shapes"))
    parser.add_argument("--checkpoint", default="model_final.pth", help="such as model_0000599.pth")
    args = parser.parse_args(argv)
    try:
        found = evaluate(args.folder, args.configs, args.checkpoint)
    except (ValueError, OSError) as error:
        print(f"table_5.py: error: {error}", file=sys.stderr)
        return 1
    text = as_text(found)
    replace(args.folder / "table_5.md", lambda aside: aside.write_text(text + "\n", "utf-8"))
    plot(
        args.folder / "table_5.png", found, {"bccd": "blood cells"}.get(args.configs, args.configs)
    )
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
