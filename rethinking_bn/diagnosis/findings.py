"""What a diagnosis consists of: findings, their order, and what to do about them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

SEVERITIES = ("ok", "note", "warning", "severe")

KINDS = (
    "non-finite",
    "impossible-variance",
    "identity-statistics",
    "repeated-use",
    "stale-statistics",
    "mixed-modes",
    "dependent-samples",
    "small-batch",
    "dead-channels",
    "domain-shift",
    "output-effect",
)

REMEDIES = {
    "repeated-use": "take statistics per domain, or share them in training too "
    "(MultiDomainBatchNorm2d; rows 1, 4 or 6 of the paper's Table 5)",
    "stale-statistics": "estimate the population statistics (estimate_population_statistics), or "
    "train with a larger momentum",
    "small-batch": "a larger normalisation batch: more images per GPU, SyncBN; or freeze near the "
    "end, mini-batch statistics at inference, GN, MABN",
    "dependent-samples": "shuffle what is normalised together: a shuffled loader, shuffle BN in "
    "RoI heads (ShuffleBNBoxHead), or SyncBN",
    "domain-shift": "estimate statistics of the target domain "
    "(estimate_population_statistics on its images)",
    "identity-statistics": "load the statistics that belong to these weights, or estimate them "
    "(estimate_population_statistics)",
    "dead-channels": "look at what feeds these channels (zero filters, dead ReLUs); prune them, or "
    "estimate the statistics again",
    "non-finite": "find what makes the first such layer's input infinite (learning rate, overflow "
    "in half precision), then load or estimate statistics again",
    "impossible-variance": "load these statistics again, or estimate them: no data have such a "
    "variance",
    "mixed-modes": "freeze or thaw the layers of a block alike (freeze_batch_norm), and estimate "
    "the statistics of frozen layers before freezing",
    "output-effect": "look at the layers with the largest effect first",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was measured about one layer.

    Attributes:
        kind: one of ``KINDS``.
        layer: the module's name; "" for the model as a whole.
        severity: "ok", "note", "warning" or "severe".
        evidence: numbers by name; lists of channels are cut at 16.
        remedy: what to do; "" where nothing is.
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
        do = f"; do: {self.remedy}" if self.remedy else ""
        return f"{self.what}{do}"

    @property
    def rank(self) -> tuple[int, float, int]:
        """Sort key: the worst first, by the output's change where that was measured."""
        size = self.evidence.get("output_change", self.effect)
        size = math.inf if math.isnan(size) else size
        return -SEVERITIES.index(self.severity), -size, KINDS.index(self.kind)


def make(
    kind: str, layer: str, severity: str, what: str, effect: float, **evidence: Any
) -> Finding:
    """Return a finding, with the remedy of its kind unless it is "ok"."""
    remedy = "" if severity == "ok" else REMEDIES[kind]
    return Finding(kind, layer, severity, evidence, remedy, what, float(effect))


def severity_of(effect: float, limits: tuple[float, float, float]) -> str:
    """Return the severity of an effect by three ascending limits; NaN is severe."""
    if math.isnan(effect):
        return "severe"
    return SEVERITIES[sum(effect >= limit for limit in limits)]
