#!/usr/bin/env python3
"""Plant defects in healthy models and count how often the diagnosis finds them.

Twenty seeds of a small residual classifier, every kind at several strengths, and three of each
detector; trials that the file has already are not run again:

    python tools/diagnosis_trial.py --model classifier --seeds 100:120
    for model in {torchvision,detectron2}_{retinanet,mask_rcnn}; do
        python tools/diagnosis_trial.py --model $model --seeds 100:103
    done
    python tools/diagnosis_trial.py --report docs/diagnosis_trial

A trial is found when the planted kind is reported (note or worse) at the planted layer; a false
alarm is any report in a healthy twin.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", category=FutureWarning)

from rethinking_bn.diagnosis import diagnose  # noqa: E402
from rethinking_bn.diagnosis.result import SEVERITIES  # noqa: E402
from trials import cases, plants  # noqa: E402
from trials.plants import GRADED, KINDS, Planted  # noqa: E402
from trials.report import write_curve, write_table  # noqa: E402

MODELS = (
    "classifier",
    "torchvision_retinanet",
    "torchvision_mask_rcnn",
    "detectron2_retinanet",
    "detectron2_mask_rcnn",
)
CHANGES = (0.03, 0.1, 0.3)  # of the output, at which graded defects are planted


def trial(case: cases.Case, kind: str, planted: Planted) -> dict[str, Any]:
    """Diagnose one model; return what was found, and all that was reported."""
    diagnosis = diagnose(
        planted.model, planted.batches, target_batches=planted.target, forward=case.forward,
        progress=False,
    )  # fmt: skip
    of = diagnosis.of(kind, planted.layer or None)
    if kind == "output-effect":
        of = (*of, *diagnosis.of("stale-statistics"))
    found = max((f.severity for f in of), key=SEVERITIES.index, default="ok")
    reported = sorted({f.kind for f in diagnosis.findings if f.severity != "ok"})
    return {"found": found, "reported": reported}


def run(model: str, seed: int, plan: list[tuple[str, float]]) -> list[dict[str, Any]]:
    """Return the trials of one healthy model, by kind ("healthy" is one) and change of the output.

    Where no change is asked for (NaN), a defect is planted as in detectors, or is there or not.
    """
    case = getattr(cases, model)(seed)
    trials = []
    for kind, at in plan:
        strength = plants.STRONG.get(kind, 1.5)
        if not math.isnan(at):
            strength = plants.strength_for(kind, case, at, seed)
        planted = plants.plant(kind, case, strength, seed)
        about = {"model": model, "seed": seed, "kind": kind, "at": at, "strength": strength}
        if model == "classifier":
            about["change"] = plants.output_change(kind, case, planted)
        trials.append(about | trial(case, kind, planted))
    return trials


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="classifier")
    parser.add_argument("--seeds", default="100:120", help="first:end (default: 100:120)")
    parser.add_argument("--changes", nargs="+", type=float, default=CHANGES, help="of the output")
    parser.add_argument("--kinds", nargs="+", choices=("healthy", *KINDS), default=None)
    parser.add_argument("--trials", type=Path, default=Path("output/diagnosis_trial.jsonl"))
    parser.add_argument("--report", type=Path, help="write the table (.md) and the curve (.png)")
    args = parser.parse_args()
    done = []
    if args.trials.exists():
        done = [json.loads(line) for line in args.trials.read_text().splitlines()]
    if args.report:
        print(write_table(done, args.report.with_suffix(".md")))
        write_curve(done, args.report.with_suffix(".png"))
        return
    args.trials.parent.mkdir(parents=True, exist_ok=True)
    graded = args.changes if args.model == "classifier" else ()
    plan = [
        (kind, change)
        for kind in args.kinds or ("healthy", *KINDS)
        for change in (graded if kind in GRADED and graded else (math.nan,))
    ]
    for seed in range(*map(int, args.seeds.split(":"))):
        had = {(t["kind"], str(t["at"])) for t in done
               if (t["model"], t["seed"]) == (args.model, seed)}  # fmt: skip
        wanted = [each for each in plan if (each[0], str(each[1])) not in had]
        trials = run(args.model, seed, wanted) if wanted else []
        with args.trials.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(trial) + "\n" for trial in trials)
        for each in trials:
            print(each, flush=True)


if __name__ == "__main__":
    main()
