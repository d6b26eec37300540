"""A study's table beside the paper's, its claims, its plot."""

from __future__ import annotations

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
    if report["claims"]:
        claims = [("the paper finds that", "high - low", f"holds here ({_seeds(report)})")]
        for c in report["claims"]:
            claims.append((c["claim"], _with_spread(c["difference"], c["std"]), c["holds"]))
        lines += [*_aligned(claims), ""]
    return "\n".join(lines)


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
    for number, panel in enumerate(panels):
        _draw(grid[0][number], panel, report, found, ours=True)
        _draw(grid[1][number], panel, report, found, ours=False)
        if len(panel.series) > 1:
            place: Any = "center" if beside else ("left", "right")[number % 2]
            handles, labels = grid[0][number].get_legend_handles_labels()
            title = None if beside else panel.title
            options: Any = {"title": title, "fontsize": "small", "loc": f"outside lower {place}"}
            figure.legend(handles, labels, **options)
    figure.suptitle("\n".join(wrap(study.title, width=round(10 * size[0]))))
    replace(path, lambda aside: figure.savefig(aside, dpi=110, format="png"))


def _draw(axes: Any, panel: Panel, report: dict[str, Any], found: Any, *, ours: bool) -> None:
    if not ours and not panel.paper:
        axes.set_axis_off()
        return
    measured = [[p for p in series.points if p.key in found] for series in panel.series]
    ticks = list(dict.fromkeys(p.x for points in measured for p in points))
    ticks = [tick for tick in panel.ticks if tick in ticks] or ticks
    for number, (series, points) in enumerate(zip(panel.series, measured, strict=True)):
        points = [p for p in points if ours or p.paper is not None]
        aside = 0.12 * (number - len(measured) / 2 + 0.5)
        aside = 0.0 if panel.ordered or panel.ticks else aside
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
    label = panel.y_label
    if not ours and panel.paper_label:
        axes.invert_yaxis()
        label = f"{panel.paper_label}, axis reversed"
    axes.set(xlabel=panel.x_label, ylabel=label)
    axes.set_xticks(range(len(ticks)), ticks, rotation=35 if len("".join(ticks)) > 48 else 0)
    axes.set_xlim(-0.5, len(ticks) - 0.5)
    axes.grid(alpha=0.3)
