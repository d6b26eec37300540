"""The table and the curve of tools/diagnosis_trial.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rethinking_bn.files import replace
from trials.plants import ONCE

Trial = dict[str, Any]


def write_table(trials: Sequence[Trial], path: Path) -> str:
    """Write and return the Markdown table: what was found, how often, how strong it was."""
    lines = ["| model | planted | strength | output changes by | found | of them severe |"]
    lines.append("|---|---|---|---|---|---|")
    models = list(dict.fromkeys(t["model"] for t in trials))
    keys = dict.fromkeys((t["model"], t["kind"], _level(t)) for t in trials)
    for model, kind, level in sorted(keys, key=lambda key: models.index(key[0])):
        group = [t for t in trials if (t["model"], t["kind"], _level(t)) == (model, kind, level)]
        if kind == "healthy":
            alarms = sum(bool(t["reported"]) for t in group)
            lines.append(f"| {model} | nothing | | | false alarms in {alarms} of {len(group)} | |")
            continue
        found = [t for t in group if t["found"] != "ok"]
        severe = sum(t["found"] == "severe" for t in group)
        changes = [t["change"] for t in group if "change" in t]
        told = f"{median(changes):.2f}" if changes else ""
        strength = "" if kind in ONCE else f"{median(t['strength'] for t in group):.2g}"
        lines.append(
            f"| {model} | {kind} | {strength} | {told} | {len(found)} of {len(group)} | {severe} |"
        )
    text = "\n".join(lines) + "\n"
    replace(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    return text


def _level(trial: Trial) -> float:
    """What puts trials of different seeds into one row."""
    if trial["kind"] == "healthy":
        return 0.0
    return trial.get("strength", 0.0) if math.isnan(_at(trial)) else _at(trial)


def _at(trial: Trial) -> float:
    return float(trial.get("at", math.nan))


def write_curve(trials: Sequence[Trial], path: Path) -> None:
    """Draw the share found, and that called severe, over the change of the classifier's output.

    Nothing is drawn where defects were planted at one change alone.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = [t for t in trials if t["model"] == "classifier" and not math.isnan(_at(t))]
    if len({_at(t) for t in chosen}) < 2:
        return
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, title, severities in (
        (axes[0], "found", ("note", "warning", "severe")),
        (axes[1], "called severe", ("severe",)),
    ):
        for kind in dict.fromkeys(t["kind"] for t in chosen):
            points = []
            for at in sorted({_at(t) for t in chosen}):
                group = [t for t in chosen if t["kind"] == kind and t["at"] == at]
                if group:
                    share = sum(t["found"] in severities for t in group) / len(group)
                    points.append((median(t["change"] for t in group), share))
            ax.plot(*zip(*points, strict=True), "o-", label=kind)
        ax.set(title=title, xlabel="change of the output, standard deviations", ylim=(-0.03, 1.03))
        ax.set_xscale("log")
        ax.set_xticks([0.03, 0.1, 0.3], ["0.03", "0.1", "0.3"])
        ax.minorticks_off()
    axes[0].set_ylabel("share of seeds")
    axes[0].legend(fontsize=8)
    replace(path, lambda aside: figure.savefig(aside, dpi=110, format="png"))
