"""A study's table beside the paper's, its claims, its plot."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from textwrap import wrap
from typing import Any

from rethinking_bn.files import replace
from rethinking_bn.studies.study import Claim, Study


def summarise(study: Study, values: dict[str, list[float]]) -> dict[str, Any]:
    """Return {"table": rows, "claims": rows} of plain values.

    A claim holds ("yes") when the mean over seeds of high - low exceeds the standard deviation of
    that difference, does not ("no") when it is below minus that, and is "within noise" between.
    Where the paper finds two about equal, it holds when they are within twice the deviation. One
    seed has no deviation to compare with: then the sign decides, and equality is "unknown".
    """
    table = [
        {
            "panel": panel.title,
            "arm": series.label,
            "x": point.x,
            "key": point.key,
            "mean": statistics.fmean(values[point.key]),
            "std": _spread(values[point.key]),
            "paper": point.paper,
        }
        for panel in study.panels
        for series in panel.series
        for point in series.points
    ]
    return {"table": table, "claims": [_judge(claim, values) for claim in study.claims]}


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _judge(claim: Claim, values: dict[str, list[float]]) -> dict[str, Any]:
    pairs = zip(values[claim.high], values[claim.low], strict=True)
    differences = [high - low for high, low in pairs]
    mean, spread = statistics.fmean(differences), _spread(differences)
    if claim.similar:
        holds = "unknown" if spread is None else "yes" if abs(mean) <= 2 * spread else "no"
    elif abs(mean) <= (spread or 0.0):
        holds = "within noise"
    else:
        holds = "yes" if mean > 0 else "no"
    return {
        "claim": claim.text,
        "low": claim.low,
        "high": claim.high,
        "similar": claim.similar,
        "difference": mean,
        "std": spread,
        "holds": holds,
    }


def as_text(report: dict[str, Any]) -> str:
    """Return the tables for the terminal."""
    seeds = report["seeds"]
    lines = [f"{report['title']} ({report['source']}; {len(seeds)} seed{'s' * (len(seeds) > 1)})"]
    if report["quick"]:
        lines.append("--quick: the numbers say little")
    rows = [("", "", "ours", "paper")]
    panel = None
    for row in report["table"]:
        if row["panel"] != panel:
            panel = row["panel"]
            rows.append((f"[{panel}]", "", "", ""))
        paper = "" if row["paper"] is None else f"{row['paper']:g}"
        rows.append((row["arm"], row["x"], _with_spread(row["mean"], row["std"]), paper))
    lines += ["", *_aligned(rows), ""]
    claims = [("the paper finds that", "high - low", "holds here")]
    claims += [
        (c["claim"], _with_spread(c["difference"], c["std"]), c["holds"]) for c in report["claims"]
    ]
    return "\n".join([*lines, *_aligned(claims), ""])


def _with_spread(mean: float, spread: float | None) -> str:
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"


def _aligned(rows: list[Any]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def write_csv(path: Path, report: dict[str, Any]) -> None:
    """Write the table, one line per quantity, with the values of every seed."""
    names = ["panel", "arm", "x", "mean", "std", "paper"]
    seeds = [f"seed_{seed}" for seed in report["seeds"]]

    def write(aside: Path) -> None:
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*names, *seeds])
            for row in report["table"]:
                writer.writerow([*(row[n] for n in names), *report["values"][row["key"]]])

    replace(path, write)


def plot(path: Path, study: Study, report: dict[str, Any]) -> None:
    """Draw ours with error bars over seeds; the paper's values, hollow, have an axis of their own.

    Other data and another network make other numbers: what compares is the shape.
    """
    from matplotlib.figure import Figure  # slow to import, and needed only here

    found = {row["key"]: row for row in report["table"]}
    figure = Figure(figsize=(max(8.0, 6.4 * len(study.panels)), 4.4), layout="constrained")
    axes_of = figure.subplots(1, len(study.panels), squeeze=False)[0]
    for axes, panel in zip(axes_of, study.panels, strict=True):
        ticks = list(dict.fromkeys(p.x for series in panel.series for p in series.points))
        paper = axes.twinx() if panel.paper else None
        for number, series in enumerate(panel.series):
            colour, rows = f"C{number}", [found[point.key] for point in series.points]
            aside = 0.0 if panel.ordered else 0.12 * (number - (len(panel.series) - 1) / 2)
            x = [ticks.index(point.x) + aside for point in series.points]
            axes.errorbar(
                x,
                [row["mean"] for row in rows],
                [row["std"] or 0.0 for row in rows],
                fmt="o-" if panel.ordered else "o", capsize=3, color=colour, label=series.label,
            )  # fmt: skip
            known = [(i, p.paper) for i, p in zip(x, series.points, strict=True) if p.paper]
            if paper is not None and known:
                places, numbers = zip(*known, strict=True)
                style = "D--" if panel.ordered else "D"
                paper.plot(places, numbers, style, color=colour, mfc="none", alpha=0.5)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=f"ours: {panel.y_label}")
        axes.set_xticks(range(len(ticks)), ticks)
        if len("".join(ticks)) > 60:
            axes.tick_params(axis="x", rotation=30)
        axes.grid(alpha=0.3)
        if paper is not None:
            label = panel.paper_label or panel.y_label
            paper.set_ylabel(f"◇ paper ({panel.paper}): {label}")
        if len(panel.series) > 1:
            axes.legend(fontsize="small")
    count = len(report["seeds"])
    title = f"{study.title} ({count} seed{'s' * (count > 1)})"
    figure.suptitle("\n".join(wrap(title, width=round(10 * figure.get_figwidth()))))
    replace(path, lambda aside: figure.savefig(aside, dpi=120, format="png"))
