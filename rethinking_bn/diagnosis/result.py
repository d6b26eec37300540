"""What a diagnosis gives: findings with their severity, as text, JSON and a picture."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rethinking_bn.files import replace

SEVERITIES = ("ok", "note", "warning", "severe")
_DISTANCE = (0.05, 0.15, 0.5)
# from which effect on a finding is a note, a warning, severe; docs/diagnosis.md says of what
LIMITS: dict[str, tuple[float, float, float]] = {
    "non-finite": (1, 1, 1),  # channels
    "impossible-variance": (1, 1, 1),
    "identity-statistics": _DISTANCE,
    "repeated-use": (0.05, 0.15, 0.4),
    "stale-statistics": _DISTANCE,
    "mixed-modes": _DISTANCE,
    "dependent-samples": (0.02, 0.1, 0.3),
    "small-batch": (-64, -16, -4),  # independent samples, the fewer the worse
    "dead-channels": (0.0, 0.15, 0.5),
    "domain-shift": _DISTANCE,
    "output-effect": (0.02, 0.1, 0.3),
}
KINDS = tuple(LIMITS)
_FEW = 20  # batches
_WHOLE = "(the model)"


@dataclass(frozen=True)
class Finding:
    """One thing that was measured about one layer.

    Attributes:
        kind: one of ``KINDS``.
        layer: the module's name; "" for the model as a whole.
        severity: "ok", "note", "warning" or "severe".
        evidence: numbers by name; lists of channels are cut at 16.
        remedy: what to do, code between backticks; "" where nothing is.
        what: one sentence with the numbers.
        effect: the size by which findings of a severity are ordered.
    """

    kind: str
    layer: str
    severity: str
    evidence: dict[str, Any] = field(default_factory=dict)
    remedy: str = ""
    what: str = ""
    effect: float = 0.0

    def __str__(self) -> str:
        return f"{self.what}; do: {self.remedy}" if self.remedy else self.what


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`rethinking_bn.diagnosis.diagnose` found.

    ``print`` shows a line for each cause, the worst first, with its layers counted.

    Attributes:
        findings: the worst first; what is fine is there too, as "ok" with its numbers.
        layers: names of the BN-like layers, in the order of the model's modules.
        batches: how many were seen, on all ranks together.
        world: ranks.
        seconds: what it took.
        unreached: layers that no finite value reached.
        left: modules that look like BatchNorm but were left alone, with the reason.
    """

    findings: tuple[Finding, ...]
    layers: tuple[str, ...]
    batches: int
    world: int
    seconds: float
    unreached: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def severe(self) -> tuple[Finding, ...]:
        """The severe findings, worst first."""
        return tuple(f for f in self.findings if f.severity == "severe")

    def of(self, kind: str, layer: str | None = None) -> tuple[Finding, ...]:
        """Return the findings of a kind, of one layer if given, "ok" included."""
        return tuple(
            f for f in self.findings if f.kind == kind and (layer is None or f.layer == layer)
        )

    def count(self, severity: str) -> int:
        """Return how many findings have a severity."""
        return sum(f.severity == severity for f in self.findings)

    def __str__(self) -> str:
        return self.as_text()

    def as_text(self, verbose: bool = False) -> str:
        """Return a line for each cause, or all findings layer by layer."""
        severe, warning, note = (self.count(s) for s in reversed(SEVERITIES[1:]))
        lines = [
            f"diagnosis of {len(self.layers)} BN-like layers on {self.batches} batches: {severe} "
            f"severe, {warning} warning{'s' * (warning != 1)}, {note} note{'s' * (note != 1)}"
        ]
        if self.batches < _FEW:
            lines.append(f'(few batches: what is "ok" may only be uncertain; take {_FEW} or more)')
        loud = [f for f in self.findings if f.severity != "ok"]
        lines += self._by_layer(loud) if verbose else self._by_cause(loud)
        fine = len(self.layers) - len({f.layer for f in loud if f.layer})
        if fine:
            lines.append(f"ok       {fine} layers")
        if self.unreached:
            lines.append(f"not reached by any value: {', '.join(self.unreached)}")
        if self.left:
            lines.append(f"left alone: {'; '.join(self.left)}")
        return "\n".join(lines)

    def _by_cause(self, loud: list[Finding]) -> Iterator[str]:
        groups: dict[tuple[str, str], list[Finding]] = {}
        for finding in loud:
            cause = finding.kind, finding.evidence.get("cause", "")
            groups.setdefault(cause, []).append(finding)
        told = {f.layer for f in loud if f.kind != "output-effect"}
        for (kind, _), group in groups.items():
            if kind == "output-effect":  # of a single layer, its other findings tell
                group = [f for f in group if f.layer not in told]
            if group:
                worst = group[0]
                where = worst.layer or _WHOLE
                if len(group) > 1:
                    where = f"{len(group)} layers, worst {where}"
                yield f"{worst.severity:8} {kind}: {where}: {worst}"

    def _by_layer(self, loud: list[Finding]) -> Iterator[str]:
        by_layer: dict[str, list[Finding]] = {}
        for finding in loud:
            by_layer.setdefault(finding.layer, []).append(finding)
        told: set[str] = set()  # a remedy is printed once, where its kind is worst
        for name, findings in by_layer.items():
            kinds = ", ".join(dict.fromkeys(f.kind for f in findings))
            yield f"{findings[0].severity:8} {name or _WHOLE}  {kinds}"
            for f in findings:
                text = f"{f.kind}: {f.what}" + ("" if f.remedy in told else f"; do: {f.remedy}")
                told.add(f.remedy)
                yield textwrap.indent(textwrap.fill(text, 91, subsequent_indent="  "), " " * 9)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; numbers that are not finite become strings."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain | {"seconds": round(self.seconds, 3)}

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the diagnosis as JSON text; with a path, write it there too."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path is not None:
            replace(path, lambda aside: aside.write_text(text + "\n", encoding="utf-8"))
        return text

    def scalars(self) -> Iterator[tuple[str, float]]:
        """Yield names and numbers for a plot over time: counts, and the largest of each effect."""
        for severity in SEVERITIES[1:]:
            yield severity, float(self.count(severity))
        largest: dict[str, float] = {}
        for f in self.findings:
            if math.isfinite(f.effect):
                largest[f.kind] = max(largest.get(f.kind, 0.0), f.effect)
        yield from ((kind.replace("-", "_"), value) for kind, value in largest.items())

    def plot(self, path: str | Path) -> None:
        """Draw what was measured and found along the depth; the path's suffix is the format.

        Raises:
            ImportError: without matplotlib.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        depth = {name: i for i, name in enumerate(self.layers)}
        width = max(7.0, min(16.0, 0.22 * len(depth) + 3))
        figure = Figure(figsize=(width, 8.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(_PANELS), 1, sharex=True)
        for ax, (title, severe, series) in zip(axes, _PANELS, strict=True):
            for colour, (kind, key) in enumerate(series):
                points = sorted(
                    (depth[f.layer], f.evidence[key], f.severity)
                    for f in self.of(kind)
                    if f.layer in depth and math.isfinite(f.evidence.get(key, math.nan))
                )
                if points:
                    x, y, severities = zip(*points, strict=True)
                    label = f"{kind} {key}".replace("_", " ")
                    ax.plot(x, y, ".-", linewidth=0.8, color=f"C{colour}", label=label)
                    ax.scatter(x, y, [40 * (s in _LOUD) for s in severities],
                               [_LOUD.get(s, "none") for s in severities], marker="X")  # fmt: skip
            ax.axhline(severe, color="grey", linewidth=0.6, linestyle=":")
            ax.set_ylim(bottom=0)
            ax.set_title(title, fontsize=9, loc="left")
            if ax.get_legend_handles_labels()[0]:
                ax.legend(fontsize=7, loc="upper right", ncols=4)
        every = max(1, len(depth) // 60)
        names = list(depth)[::every]
        axes[-1].set_xticks(list(depth.values())[::every], names, rotation=90, fontsize=6)
        for finding in (*self.of("non-finite"), *self.of("impossible-variance")):
            if finding.severity == "severe":
                axes[0].axvline(depth[finding.layer], color="crimson", linewidth=0.8)
        figure.suptitle(str(self).splitlines()[0], fontsize=10)
        kind = Path(path).suffix.lstrip(".") or "png"
        replace(path, lambda aside: figure.savefig(aside, dpi=110, format=kind))


# title, severe from, (kind, number in its evidence)
_PANELS: tuple[tuple[str, float, list[tuple[str, str]]], ...] = (
    ("stored statistics, standard deviations from the data's", 0.5,
     [(kind, "distance") for kind, limits in LIMITS.items() if limits == _DISTANCE]),
    ("within a batch, standard deviations", 0.4,
     [("small-batch", "noise"), ("dependent-samples", "excess"), ("repeated-use", "apart")]),
    ("change of the output by one layer", 0.3,
     [("output-effect", key) for key in ("stored_to_exact", "exact_to_batch")]),
)  # fmt: skip
_LOUD = {"warning": "darkorange", "severe": "crimson"}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
