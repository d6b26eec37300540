"""What a study is: its quantities beside the paper's, what they should show, how it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Settings = Mapping[str, Any]  # plain values: they go to JSON
Values = dict[str, float]  # key of a quantity -> its value for one seed


class Part(NamedTuple):
    """Work that needs no other part's result: not done again when its values were kept.

    The parts of a seed run at once, each on a process of its own, where torch has several threads
    on the CPU: ``Study.run`` is then called in each process, and must be found in its module.
    """

    keys: Sequence[str]
    run: Callable[[], Iterator[Values]]


class Point(NamedTuple):
    """One measured quantity: its key, its place on the x axis and the paper's value, if any."""

    key: str
    x: str
    paper: float | None = None


class Series(NamedTuple):
    """Quantities that make one line of a plot."""

    label: str
    points: Sequence[Point]


class Panel(NamedTuple):
    """One pair of axes. ``paper`` says where its values are from; None where it has none.

    ``paper_label`` says what they are where that is not ``y_label``; larger is then better where
    for ours smaller is, and the paper's axis is drawn reversed. Points are joined by lines where x
    has an order. ``ticks`` gives the places on the x axis; empty: as the points come.
    """

    title: str
    x_label: str
    series: Sequence[Series]
    paper: str | None = None
    paper_label: str | None = None
    y_label: str = "error (%)"
    ordered: bool = True
    ticks: Sequence[str] = ()


class Claim(NamedTuple):
    """The paper finds quantity ``low`` below ``high``; with ``similar``, about equal to it."""

    text: str
    low: str
    high: str
    similar: bool = False


@dataclass(frozen=True)
class Study:
    """A finding of the paper at laptop scale.

    Attributes:
        name, title: for the command line and the report.
        source: tables and figures compared with.
        panels, claims: what is reported.
        settings: all numbers of a run.
        quick: those that differ in a first look.
        run: (settings, seed, device) -> the quantities, some in each yield, all of them in the end;
            or parts that give them.
        seeds: how many by default.
        more: keys of quantities that are measured only when asked for (``--all``).
        seconds: (settings, keys, device) -> how long a seed takes here, measured on its first
            steps; None: it is not told.
    """

    name: str
    title: str
    source: str
    panels: Sequence[Panel]
    claims: Sequence[Claim]
    settings: Settings
    quick: Settings
    run: Callable[[Settings, int, Any], Iterator[Values | Part]]
    seeds: int = 3
    more: Sequence[str] = ()
    seconds: Callable[[Settings, Sequence[str], Any], float] | None = None

    def keys(self, everything: bool = True) -> list[str]:
        """Return the keys of the quantities, in the order of the report."""
        points = [p for panel in self.panels for series in panel.series for p in series.points]
        left_out = () if everything else self.more
        return [key for key in dict.fromkeys(p.key for p in points) if key not in left_out]
