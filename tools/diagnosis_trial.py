#!/usr/bin/env python3
"""Plant defects in healthy models and count how often the diagnosis finds them.

Twenty seeds on a small residual classifier, every kind at several strengths; then one seed each of
the detectors:

    for seed in $(seq 0 19); do python tools/diagnosis_trial.py --seed $seed; done
    for seed in 0 1 2; do
        python tools/diagnosis_trial.py --model torchvision_retinanet --seed $seed
    done
    python tools/diagnosis_trial.py --report docs/diagnosis_trial.md \\
        --curve docs/diagnosis_trial.png

A run appends its trials to a JSON-lines file; ``--report`` reads all of them. A trial is found when
the planted kind is reported (note or worse) at the planted layer; a false alarm is any report in a
healthy twin.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", category=FutureWarning)

from benchmarks import diagnosis_cases, diagnosis_plants  # noqa: E402
from benchmarks.diagnosis_plants import FRACTIONS, GRADED, KINDS, SIZES  # noqa: E402
from benchmarks.diagnosis_report import write_curve, write_table  # noqa: E402

from rethinking_bn.diagnosis import Diagnosis, diagnose  # noqa: E402

MODELS = (
    "classifier",
    "torchvision_retinanet",
    "torchvision_mask_rcnn",
    "detectron2_retinanet",
    "detectron2_mask_rcnn",
)
CHANGES = (0.03, 0.1, 0.3)  # of the output, at which graded defects are planted
STRONG = 1.5  # in detectors
STRONG_OF = {"dead-channels": 0.5, "domain-shift": 1.0, "small-batch": 2, "dependent-samples": 1.0}


def run(model: str, seed: int, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Return the trials of one healthy model, and of it with defects of some kinds."""
    case = getattr(diagnosis_cases, model)(seed)
    healthy = diagnosis_plants.Planted(
        case.model, case.batches(seed, diagnosis_plants.BATCHES),
        diagnosis_cases.others(case).batches(seed, diagnosis_plants.BATCHES), "", seed,
    )  # fmt: skip
    trials = [_trial(model, "healthy", case, healthy, 0.0, 0.0)]
    graded = model == "classifier"
    for kind in kinds:
        if not graded:
            wanted = [(STRONG_OF.get(kind, STRONG), float("nan"))]
        elif kind in GRADED:
            wanted = [
                (diagnosis_plants.strength_for(kind, case, change, seed), change)
                for change in CHANGES
            ]
        else:
            grid = {"dependent-samples": FRACTIONS, "small-batch": SIZES}.get(kind, (1.0,))
            wanted = [(strength, float("nan")) for strength in grid]
        for strength, at in wanted:
            planted = diagnosis_plants.plant(kind, case, strength, seed)
            change = diagnosis_plants.output_change(kind, case, planted) if graded else float("nan")
            trials.append(_trial(model, kind, case, planted, strength, change, at))
    return trials


def _trial(
    model: str,
    kind: str,
    case: diagnosis_cases.Case,
    planted: diagnosis_plants.Planted,
    strength: float,
    change: float,
    at: float = float("nan"),
) -> dict[str, Any]:
    diagnosis = diagnose(
        planted.model, planted.batches, target_batches=planted.target, forward=case.forward,
        progress=False,
    )  # fmt: skip
    found = _severity(diagnosis, kind, planted.layer)
    others = sorted({f.kind for f in diagnosis.findings if f.severity != "ok"})
    return {
        "model": model, "seed": planted.seed, "kind": kind, "strength": strength, "change": change,
        "at": at, "found": found, "reported": others,
    }  # fmt: skip


def _severity(diagnosis: Diagnosis, kind: str, layer: str) -> str:
    """Return the worst severity of a kind at a layer, anywhere if the layer is ""."""
    of = diagnosis.of(kind) if not layer else diagnosis.of(kind, layer)
    if kind == "output-effect":
        of = (*of, *diagnosis.of("stale-statistics"))
    return max(
        (f.severity for f in of), key=("ok", "note", "warning", "severe").index, default="ok"
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="classifier")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--trials", type=Path, default=Path("output/diagnosis_trial.jsonl"))
    parser.add_argument("--report", type=Path, help="write the table of all trials, run none")
    parser.add_argument("--curve", type=Path, help="write the curve of all trials, run none")
    args = parser.parse_args()
    if args.report or args.curve:
        trials = [json.loads(line) for line in args.trials.read_text().splitlines()]
        if args.report:
            print(write_table(trials, args.report))
        if args.curve:
            write_curve(trials, args.curve)
        return
    trials = run(args.model, args.seed, args.kinds)
    args.trials.parent.mkdir(parents=True, exist_ok=True)
    with args.trials.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(trial) + "\n" for trial in trials)
    for trial in trials:
        print({key: trial[key] for key in ("kind", "strength", "change", "found", "reported")})


if __name__ == "__main__":
    main()
