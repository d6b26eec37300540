"""The result of a diagnosis: a table for the terminal, JSON, a picture."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rethinking_bn.diagnosis.findings import SEVERITIES, Finding
from rethinking_bn.files import replace

_WIDTH = 100
_EXPLAINED = 8  # layers, the worst, whose numbers are printed; all whose kinds are new, too
_FEW = 20  # batches


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`rethinking_bn.diagnosis.diagnose` found.

    ``print`` shows a table, the worst layer first, with a sentence for every finding of the worst;
    layers that are fine are counted only.

    Attributes:
        findings: the worst first; what is fine is there too, as "ok" with its numbers.
        layers: names of the BN-like layers, in the order of the model's modules.
        batches: how many were seen, on all ranks together.
        world: ranks.
        seconds: what it took.
        unreached: layers that no finite value reached.
    """

    findings: tuple[Finding, ...]
    layers: tuple[str, ...]
    batches: int
    world: int
    seconds: float
    unreached: tuple[str, ...] = ()

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
        counts = ", ".join(
            f"{self.count(s)} {s}{'s' if s in ('warning', 'note') and self.count(s) != 1 else ''}"
            for s in reversed(SEVERITIES[1:])
        )
        lines = [
            f"diagnosis of {len(self.layers)} BN-like layers on {self.batches} batches: {counts}"
        ]
        if self.batches < _FEW:
            lines.append(f'(few batches: what is "ok" may only be uncertain; take {_FEW} or more)')
        by_layer: dict[str, list[Finding]] = {}
        for finding in self.findings:
            if finding.severity != "ok":
                by_layer.setdefault(finding.layer, []).append(finding)
        told: set[str] = set()  # a remedy is printed once, where its kind is worst
        width = max((len(name or _WHOLE) for name in by_layer), default=0)
        for number, (name, findings) in enumerate(by_layer.items()):
            kinds = list(dict.fromkeys(f.kind for f in findings))
            lines.append(f"{findings[0].severity:8} {name or _WHOLE:{width}}  {', '.join(kinds)}")
            if number >= _EXPLAINED and told.issuperset(kinds):
                continue
            said = any("output_change" in f.evidence for f in findings)
            for finding in findings:
                if said and finding.kind == "output-effect":
                    continue  # the other sentences say it
                do = "as above" if finding.kind in told else finding.remedy
                text = f"{finding.kind}: {finding.what}; do: {do}"
                lines += textwrap.wrap(
                    text, _WIDTH, initial_indent=" " * 9, subsequent_indent=" " * 11
                )
            told.update(kinds)
        if len(by_layer) > _EXPLAINED:
            lines.append("         (numbers of every layer: .findings, or the JSON file)")
        fine = len(self.layers) - len([name for name in by_layer if name])
        if fine:
            lines.append(f"ok       {fine} layers")
        if self.unreached:
            lines.append(f"not reached by any value: {', '.join(self.unreached)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; numbers that are not finite become strings."""
        return {
            "batches": self.batches,
            "world": self.world,
            "seconds": round(self.seconds, 3),
            "layers": list(self.layers),
            "unreached": list(self.unreached),
            "findings": [
                {
                    "kind": f.kind,
                    "layer": f.layer,
                    "severity": f.severity,
                    "what": f.what,
                    "remedy": f.remedy,
                    "evidence": {k: _plain(v) for k, v in f.evidence.items()},
                }
                for f in self.findings
            ],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the diagnosis as JSON text; with a path, write it there too."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path is not None:
            replace(path, lambda aside: aside.write_text(text + "\n", encoding="utf-8"))
        return text

    def plot(self, path: str | Path) -> None:
        """Draw layers along the depth: distance, noise, uses apart; findings marked. Matplotlib.

        Raises:
            ImportError: without matplotlib.
        """
        from rethinking_bn.diagnosis.picture import draw

        draw(self, Path(path))

    def scalars(self) -> Iterator[tuple[str, float]]:
        """Yield names and numbers for a plot over time: counts, and the largest of each effect."""
        for severity in SEVERITIES[1:]:
            yield severity, float(self.count(severity))
        largest: dict[str, float] = {}
        for f in self.findings:
            if math.isfinite(f.effect):
                largest[f.kind] = max(largest.get(f.kind, 0.0), f.effect)
        yield from ((kind.replace("-", "_"), value) for kind, value in largest.items())


_WHOLE = "(the model)"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
