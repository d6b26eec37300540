#!/usr/bin/env python3
"""Plant defects in healthy models and count how often the diagnosis finds them.

Trials that the file has already are not run again; the report is of all that it has:

    python tools/diagnosis_trial.py --model torchvision_row{1,4,6} detectron2_row{1,4,6} \\
        --kinds healthy --seeds 100:120
    python tools/diagnosis_trial.py --model head --kinds healthy copies crops sorted
    python tools/diagnosis_trial.py --report docs/diagnosis_trial.md

A trial is found when the planted kind is reported (note or worse) at the planted layer; of a
healthy twin, all that is reported is counted.
"""

from __future__ import annotations

import argparse
import json
import warnings
from itertools import product
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", category=FutureWarning)

from rethinking_bn.diagnosis import diagnose  # noqa: E402
from rethinking_bn.diagnosis.result import SEVERITIES  # noqa: E402
from rethinking_bn.files import replace  # noqa: E402
from trials.cases import CASES  # noqa: E402
from trials.plants import BATCHES, KINDS, plant  # noqa: E402


def trials(model: str, seed: int, kinds: list[str]) -> list[dict[str, Any]]:
    """Diagnose a healthy model of one seed with each of the defects; return what was reported."""
    case, results = CASES[model](seed), []
    for kind in kinds:
        planted = plant(kind, case, seed)
        keywords: Any = {"target_batches": planted.target, "forward": case.forward}
        diagnosis = diagnose(planted.model, planted.batches, progress=False, **keywords)
        loud = [f for f in diagnosis.findings if f.severity != "ok"]
        sought = "dependent-samples" if kind in BATCHES else kind
        kinds_found = (sought, "stale-statistics") if kind == "output-effect" else (sought,)
        of = [f for f in loud if f.kind in kinds_found and planted.layer in ("", f.layer)]
        results.append({
            "model": model, "seed": seed, "kind": kind,
            "found": max((f.severity for f in of), key=SEVERITIES.index, default="ok"),
            "severe": diagnosis.count("severe"), "warnings": diagnosis.count("warning"),
            "reported": sorted({f"{f.severity} {f.kind}" for f in loud}),
        })  # fmt: skip
        print(results[-1], flush=True)
    return results


def table(done: list[dict[str, Any]]) -> str:
    """Return the Markdown table: how often what was planted was found."""
    lines = ["| model | planted | seeds | found | severe | warnings of any kind |"]
    lines.append("|---|---|---|---|---|---|")
    for model, kind in dict.fromkeys((t["model"], t["kind"]) for t in done):
        group = [t for t in done if (t["model"], t["kind"]) == (model, kind)]
        seeds = sorted(t["seed"] for t in group)
        of = f"of {len(group)}"
        found = "" if kind == "healthy" else f"{sum(t['found'] != 'ok' for t in group)} {of}"
        loud = (f"{sum(t[name] > 0 for t in group)} {of}" for name in ("severe", "warnings"))
        lines.append(
            f"| {model} | {kind} | {seeds[0]} to {seeds[-1]} | {found} | {' | '.join(loud)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=CASES, default=["classifier"])
    parser.add_argument("--seeds", default="100:120", help="first:end (default: 100:120)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--trials", type=Path, default=Path("output/diagnosis_trial.jsonl"))
    parser.add_argument("--report", type=Path, help="write the table (.md)")
    args = parser.parse_args()
    args.trials.parent.mkdir(parents=True, exist_ok=True)
    args.trials.touch()
    done = [json.loads(line) for line in args.trials.read_text().splitlines()]
    if args.report:
        text = table(done)
        if args.report.exists():  # what follows the table stays
            _, gap, rest = args.report.read_text(encoding="utf-8").partition("\n\n")
            text += f"\n{rest}" if gap else ""
        replace(args.report, lambda aside: aside.write_text(text, encoding="utf-8"))
        print(text)
        return
    for seed, model in product(range(*map(int, args.seeds.split(":"))), args.model):
        had = {t["kind"] for t in done if (t["model"], t["seed"]) == (model, seed)}
        if wanted := [kind for kind in args.kinds if kind not in had]:
            with args.trials.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(t) + "\n" for t in trials(model, seed, wanted))


if __name__ == "__main__":
    main()
