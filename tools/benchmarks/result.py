"""What a comparison found, as Markdown and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.timing import Spread, spread
from rethinking_bn.files import replace, write_json

_COLUMNS = ("case", "ours", "beside", "ours", "beside", "ratio", "goal")


@dataclass(frozen=True)
class Measurement:
    """Ours beside one alternative.

    Attributes:
        case: what was measured, and on what.
        ours, other: names of the two sides.
        unit: of the values.
        our_value, other_value: median and quartiles.
        ratio: ours / other, round by round; None where it cannot be told from noise.
        goal: what the ratio is to stay below, where there is such a thing.
    """

    case: str
    ours: str
    other: str
    unit: str
    our_value: Spread
    other_value: Spread
    ratio: Spread | None
    goal: float | None = None

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table."""
        values = [f"{_text(v)} {self.unit}".rstrip() for v in (self.our_value, self.other_value)]
        ratio = "within noise" if self.ratio is None else _text(self.ratio)
        goal = "" if self.goal is None else f"≤ {self.goal:g}"
        return (self.case, self.ours, self.other, *values, ratio, goal)


@dataclass
class Result:
    """The outcome of one comparison; ``checks`` holds largest relative errors."""

    name: str
    seconds: float = 0.0
    checks: dict[str, float] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def measure(
        self,
        case: str,
        ours: tuple[str, Sequence[float]],
        other: tuple[str, Sequence[float]],
        *,
        unit: str = "ms",
        scale: float = 1e3,
        goal: float | None = None,
        paired: Sequence[float] | None = None,
    ) -> None:
        """Add a measurement.

        Args:
            ours, other: name and repeated values, in the same rounds.
            scale: what turns the values into ``unit``.
            paired: the ratios, where they are not those of the values round by round, by which a
                drift of the machine cancels.
        """
        if paired is None:
            paired = [a / b for a, b in zip(ours[1], other[1], strict=True) if b > 0]
        values = [spread([value * scale for value in side[1]]) for side in (ours, other)]
        ratio = spread(paired) if paired else None
        self.measurements.append(
            Measurement(case, ours[0], other[0], unit, values[0], values[1], ratio, goal)
        )

    def skip(self, what: str, reason: str) -> None:
        """Say what was left out, and why."""
        self.notes.append(f"skipped: {what}: {reason}")

    def as_markdown(self) -> str:
        """Return the table and the notes; quartiles are in brackets."""
        lines = [_COLUMNS, ("---",) * len(_COLUMNS), *(m.cells() for m in self.measurements)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts = [f"## {self.name} ({self.seconds:.0f} s)", *([table] if self.measurements else [])]
        if self.checks:
            what, error = max(self.checks.items(), key=lambda item: item[1])
            parts.append(
                f"Equal results were checked first ({len(self.checks)} checks; largest relative "
                f"error {error:.1e}: {what})."
            )
        return "\n\n".join([*parts, *(f"- {note}" for note in self.notes)]) + "\n"


def _text(value: Spread) -> str:
    median, low, high = (f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.3g}" for v in value)
    return median if value.low == value.high else f"{median} [{low}, {high}]"


def write_report(folder: Path, name: str, report: dict[str, Any], results: list[Result]) -> Path:
    """Write ``<name>.json`` and ``.md``; return the path of the JSON."""
    path = folder / f"{name}.json"
    write_json(path, {**report, "comparisons": [asdict(result) for result in results]})
    markdown = "\n".join(result.as_markdown() for result in results)
    replace(path.with_suffix(".md"), lambda aside: aside.write_text(markdown, encoding="utf-8"))
    return path
