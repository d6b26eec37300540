"""What a study is: its quantities beside the paper's, what they should show, how it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Settings = Mapping[str, Any]  # plain values: they go to JSON
Values = dict[str, float]  # key of a quantity -> its value for one seed


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

    ``paper_label`` says what they are where that is not ``y_label``. Points are joined by lines
    where x has an order.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    paper: str | None = None
    paper_label: str | None = None
    ordered: bool = True


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
        settings, quick: all numbers of a run; by default, and for a first look.
        parts: results that ``run`` yields for one seed, for the progress bar.
        run: (settings, seed, device) -> the quantities, some in each yield, all of them in the end.
        seeds: how many by default.
    """

    name: str
    title: str
    source: str
    panels: Sequence[Panel]
    claims: Sequence[Claim]
    settings: Settings
    quick: Settings
    parts: int
    run: Callable[[Settings, int, torch.device], Iterator[Values]]
    seeds: int = 3

    def keys(self) -> list[str]:
        """Return the keys of all quantities, in the order of the report."""
        points = [p for panel in self.panels for series in panel.series for p in series.points]
        return list(dict.fromkeys(point.key for point in points))
