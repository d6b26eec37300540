"""Results as Markdown, JSON and curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.result import Cell, Measurement, Result, Table
from benchmarks.timing import Spread
from rethinking_bn.files import replace, write_json

_COLUMNS = ("case", "ours", "beside", "ours", "beside", "ratio")


def as_markdown(result: Result) -> str:
    """Return a comparison's tables and notes; quartiles are in brackets."""
    parts = [f"## {result.name} ({result.seconds:.0f} s)"]
    if result.measurements:
        rows = [_measurement_row(measurement) for measurement in result.measurements]
        parts.append(_markdown_table(_COLUMNS, rows))
    for table in result.tables:
        parts.append(f"{table.title}:\n\n{_markdown_table(table.columns, table.rows)}")
    if result.checks:
        worst = max(result.checks.items(), key=lambda item: item[1])
        parts.append(
            f"Equal results were checked first ({len(result.checks)} checks; largest relative "
            f"error {worst[1]:.1e}: {worst[0]})."
        )
    parts += [f"- {note}" for note in result.notes]
    parts += [f"- **failed**: {failure}" for failure in result.failures]
    return "\n\n".join(parts) + "\n"


def _measurement_row(m: Measurement) -> tuple[Cell, ...]:
    ratio = "within noise" if m.ratio is None else _with_quartiles(m.ratio)
    values = [
        f"{_with_quartiles(value)} {m.unit}".rstrip() for value in (m.our_value, m.other_value)
    ]
    return (m.case, m.ours, m.other, *values, ratio)


def _with_quartiles(s: Spread) -> str:
    if s.low == s.high:
        return _number(s.median)
    return f"{_number(s.median)} [{_number(s.low)}, {_number(s.high)}]"


def _number(value: Cell) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_number(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_report(folder: Path, name: str, report: dict[str, Any], results: list[Result]) -> Path:
    """Write ``<name>.json`` and ``.md``, and a picture of the tables that are made to be plotted.

    Returns:
        The path of the JSON.
    """
    report = {**report, "comparisons": [result.to_json() for result in results]}
    path = folder / f"{name}.json"
    write_json(path, report)
    markdown = "\n".join(as_markdown(result) for result in results)
    replace(folder / f"{name}.md", lambda aside: aside.write_text(markdown, encoding="utf-8"))
    tables = [table for result in results for table in result.tables if table.plot]
    if tables:
        replace(folder / f"{name}.png", lambda aside: _plot(aside, tables))
    return path


def _plot(path: Path, tables: list[Table]) -> None:
    from matplotlib.figure import Figure  # slow to import, and needed only here

    figure = Figure(figsize=(4.5 * len(tables), 3.6), layout="constrained")
    for axes, table in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        x = [float(row[0]) for row in table.rows]
        for column in range(1, len(table.columns)):
            y = [float(row[column]) for row in table.rows]
            axes.plot(x, y, marker="o", label=table.columns[column])
        axes.set(xscale="log", yscale="log", xlabel=table.columns[0])
        axes.set_xticks(x, [f"{value:g}" for value in x], minor=False)
        axes.minorticks_off()
        axes.set_title(table.title, fontsize="medium")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")
