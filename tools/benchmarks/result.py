"""What a comparison found: measurements, tables, checks and notes."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.timing import Spread, ratios, spread

Cell = str | int | float


@dataclass(frozen=True)
class Measurement:
    """Ours beside one alternative.

    Attributes:
        case: what was measured, and on what.
        ours, other: names of the two sides.
        unit: of the values.
        our_value, other_value: median and quartiles.
        ratio: ours / other, round by round; None where it cannot be told from noise.
    """

    case: str
    ours: str
    other: str
    unit: str
    our_value: Spread
    other_value: Spread
    ratio: Spread | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        values = asdict(self)
        for name in ("our_value", "other_value", "ratio"):
            value = getattr(self, name)
            values[name] = None if value is None else value._asdict()
        return values


@dataclass(frozen=True)
class Table:
    """A titled table; with ``plot`` the first column is the x axis and the others are curves."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    plot: bool = False


@dataclass
class Result:
    """The outcome of one comparison."""

    name: str
    seconds: float = 0.0
    checks: dict[str, float] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Record a failure of what is inside, with its traceback on stderr, and go on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            line = (str(error).strip() or "no message").splitlines()[0]
            self.failures.append(f"{what}: {type(error).__name__}: {line}")

    def measure(
        self,
        case: str,
        ours: tuple[str, Sequence[float]],
        other: tuple[str, Sequence[float]],
        *,
        unit: str = "ms",
        scale: float = 1e3,
        paired: Sequence[float] | None = None,
    ) -> None:
        """Add a measurement.

        Args:
            ours, other: name and repeated values, in the same rounds.
            scale: what turns the values into ``unit``.
            paired: the ratios, where they are not those of the values round by round.
        """
        of_rounds = ratios(ours[1], other[1]) if paired is None else paired
        values = [spread([value * scale for value in side[1]]) for side in (ours, other)]
        ratio = spread(of_rounds) if of_rounds else None
        self.measurements.append(
            Measurement(case, ours[0], other[0], unit, values[0], values[1], ratio)
        )

    def skip(self, what: str, reason: str) -> None:
        """Say what was left out, and why."""
        self.notes.append(f"skipped: {what}: {reason}")

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "name": self.name,
            "seconds": self.seconds,
            "largest_relative_errors": self.checks,
            "measurements": [measurement.to_json() for measurement in self.measurements],
            "tables": [asdict(table) for table in self.tables],
            "notes": self.notes,
            "failures": self.failures,
        }
