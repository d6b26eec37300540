"""A study's table beside the paper's, its claims, its plot."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from textwrap import wrap
from typing import Any

from rethinking_bn.files import replace
from studies.study import Claim, Panel, Study


def summarise(study: Study, values: dict[str, list[float]]) -> dict[str, Any]:
    """Return {"table": rows, "claims": rows} of plain values.

    A claim holds ("yes") when the mean over seeds of high - low exceeds the standard deviation of
    that difference, does not ("no") when it is below minus that, and is "within noise" between.
    Where the paper finds two about equal, it holds when they are within twice the deviation. One
    seed has no deviation to compare with, and settles nothing: "one seed". Quantities that were
    not measured are left out, with their claims.
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
        if point.key in values
    ]
    claims = [c for c in study.claims if c.low in values and c.high in values]
    return {"table": table, "claims": [_judge(claim, values) for claim in claims]}


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _judge(claim: Claim, values: dict[str, list[float]]) -> dict[str, Any]:
    pairs = zip(values[claim.high], values[claim.low], strict=True)
    differences = [high - low for high, low in pairs]
    mean, spread = statistics.fmean(differences), _spread(differences)
    if spread is None:
        holds = "one seed"
    elif claim.similar:
        holds = "yes" if abs(mean) <= 2 * spread else "no"
    elif abs(mean) <= spread:
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
    lines = [f"{report['title']} ({report['source']}; {_seeds(report)})"]
    if report["quick"]:
        lines.append("--quick: the numbers mean nothing")
    rows = [("", "", "ours", "paper")]
    panel = None
    for row in report["table"]:
        if row["panel"] != panel:
            panel = row["panel"]
            rows.append((f"[{panel}]", "", "", ""))
        paper = "" if row["paper"] is None else f"{row['paper']:g}"
        rows.append((row["arm"], row["x"], _with_spread(row["mean"], row["std"]), paper))
    lines += ["", *_aligned(rows), ""]
    if not report["claims"]:
        return "\n".join(lines)
    claims = [("the paper finds that", "high - low", f"holds here ({_seeds(report)})")]
    claims += [
        (c["claim"], _with_spread(c["difference"], c["std"]), c["holds"]) for c in report["claims"]
    ]
    return "\n".join([*lines, *_aligned(claims), ""])


def _seeds(report: dict[str, Any]) -> str:
    count = len(report["seeds"])
    return "one seed" if count == 1 else f"{count} seeds"


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
    """Draw ours (filled, error bars over seeds), and beside it the paper's values (hollow).

    Other data and another network make other numbers, so the two never share axes: what compares
    is the order. An axis on which larger is better, beside one on which smaller is, is reversed.
    """
    from matplotlib.figure import Figure  # slow to import, and needed only here

    found = {row["key"]: row for row in report["table"]}
    panels = study.panels
    beside = len(panels) == 1  # the paper's axes are beside ours, or below them
    size = (11.0, 4.8) if beside else (max(8.0, 5.5 * len(panels)), 7.6)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(1, 2, squeeze=False).T if beside else figure.subplots(2, len(panels))
    for panel, row in [(panel, row) for panel in range(len(panels)) for row in (0, 1)]:
        axes, ours = grid[row][panel], row == 0
        _draw(axes, panels[panel], report, found, ours=ours)
        if ours and len(panels[panel].series) > 1:
            side = "center" if beside else ("left", "right")[panel % 2]
            place: Any = f"outside lower {side}"
            handles, labels = axes.get_legend_handles_labels()
            title = None if beside else panels[panel].title
            figure.legend(  # type: ignore[call-overload]  # of some versions: lists every location
                handles, labels, title=title, fontsize="small", loc=place
            )
    figure.suptitle("\n".join(wrap(study.title, width=round(10 * size[0]))))
    replace(path, lambda aside: figure.savefig(aside, dpi=110, format="png"))


def _draw(axes: Any, panel: Panel, report: dict[str, Any], found: Any, *, ours: bool) -> None:
    if not ours and not panel.paper:
        axes.set_axis_off()
        return
    shown = [
        (series, [p for p in series.points if p.key in found and (ours or p.paper is not None)])
        for series in panel.series
    ]
    ticks = list(
        dict.fromkeys(p.x for series in panel.series for p in series.points if p.key in found)
    )
    ticks = [tick for tick in panel.ticks if tick in ticks] or ticks
    for number, (series, points) in enumerate(shown):
        aside = 0.0 if panel.ordered or panel.ticks else 0.12 * (number - len(shown) / 2 + 0.5)
        x = [ticks.index(point.x) + aside for point in points]
        style = {"color": f"C{number}", "label": series.label or None}
        line = "-" if panel.ordered else ""
        if ours:
            rows = [found[point.key] for point in points]
            means, stds = ([row[n] or 0.0 for row in rows] for n in ("mean", "std"))
            axes.errorbar(x, means, stds, fmt=f"o{line}", capsize=3, **style)
        else:
            axes.plot(x, [p.paper for p in points], f"D{line}", mfc="none", **style)
    who = f"ours, {_seeds(report)}" if ours else f"the paper, {panel.paper}"
    axes.set_title(f"{panel.title}\n{who}", fontsize="medium")
    label = panel.y_label if ours or not panel.paper_label else panel.paper_label
    if not ours and panel.paper_label:
        axes.invert_yaxis()
        label += ", axis reversed"
    axes.set(xlabel=panel.x_label, ylabel=label)
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlim(-0.5, len(ticks) - 0.5)
    if len("".join(ticks)) > 48:
        axes.tick_params(axis="x", rotation=35)
    axes.grid(alpha=0.3)
