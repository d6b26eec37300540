"""What the statistics do to the model's output, and which findings that makes less of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch.distributed import ProcessGroup

from rethinking_bn.diagnosis.distance import exact_statistics
from rethinking_bn.diagnosis.effects import (
    Choice,
    Outputs,
    Variants,
    relative_change,
    squared_changes,
)
from rethinking_bn.diagnosis.findings import SEVERITIES, Finding, make, severity_of
from rethinking_bn.diagnosis.layers import DiagnosedLayer, Statistics
from rethinking_bn.diagnosis.record import Record
from rethinking_bn.distributed import all_gather_object, raise_together

CHANGE = (0.02, 0.1, 0.3)  # of the output, by one layer
_TO_BATCH = (0.5, 1.0, math.inf)  # of the output, from exact to mini-batch statistics
_CHANCE = 3.0  # times what chance gives
_FEWEST = 3  # layers whose effect is measured, however few batches there are
_BY_BATCH = ("repeated-use", "dependent-samples", "small-batch")  # felt in mini-batches
_UNGATED = ("non-finite", "impossible-variance", "output-effect")


class _Changes:
    """Changes of the output between choices of statistics, alike on all ranks.

    Attributes:
        forwards: made so far on each rank.
        reference: the outputs whose spread is the unit.
    """

    def __init__(self, variants: Variants, group: ProcessGroup | None) -> None:
        self.variants, self.group = variants, group
        self.forwards = 0
        self.reference: Outputs = ()

    def run(self, choice: Choice, batches: int) -> Outputs:
        """Return the outputs of the first batches; a rank's failure is everybody's."""
        self.forwards += batches
        outputs: Outputs = ()
        error: Exception | None = None
        try:
            outputs = self.variants(choice, batches)
        except Exception as raised:
            if self.variants.waits:  # within the model, and not here
                raise
            error = raised
        raise_together(error, self.group)
        return outputs

    def all_finite(self, outputs: Outputs) -> bool:
        finite = all(
            batch is not None and all(bool(tensor.isfinite().all()) for tensor in batch)
            for batch in outputs
        )
        return all(all_gather_object(finite, self.group))

    def between(self, one: Outputs, other: Outputs) -> float | None:
        sums = squared_changes(one, other, self.reference)
        return relative_change(all_gather_object(sums, self.group))


def output_effects(
    variants: Variants,
    layers: Sequence[DiagnosedLayer],
    records: dict[str, Record],
    targets: dict[str, Record],
    findings: list[Finding],
    budget: int,
    group: ProcessGroup | None,
) -> list[Finding]:
    """Measure what the statistics do to the output; return the findings, more and gated.

    Args:
        variants: runs the model.
        budget: about as many forwards are made, but at least those of three layers and, beyond
            it, those that decide about severe findings: for each layer one by kind of change.

    Raises:
        Exception: what the model or ``output`` raises; on the other ranks a RuntimeError.
    """
    used = [layer for layer in layers if layer.stored is not None and not layer.by_batch]
    used = [layer for layer in used if records[layer.name].uses]
    exact: Choice = {layer.name: exact_statistics(layer, records[layer.name]) for layer in used}
    half: Choice = {
        layer.name: exact_statistics(layer, records[layer.name], "even") for layer in used
    }
    by_batch: Choice = {layer.name: "batch" for layer in layers if not layer.frozen}
    count = min(len(variants.batches), max(2, budget // 12))
    changes = _Changes(variants, group)
    as_stored, as_exact, as_half, mixed = (
        changes.run(c, count) for c in ({}, exact, half, {**exact, **by_batch})
    )
    # the unit is the spread of what training sees, where frozen layers keep what they store
    trained = changes.run(by_batch, count) if any(layer.frozen for layer in layers) else mixed
    changes.reference = trained if changes.all_finite(trained) else as_exact
    to_exact = changes.between(as_stored, as_exact)
    to_half = changes.between(as_exact, as_half)
    to_batch = changes.between(as_exact, mixed)
    if to_exact is None or to_half is None or to_batch is None:
        return findings
    chance = to_half * _moving_average_factor(used, records)
    findings = [*findings, _together(to_exact, to_batch, chance, count)]

    by_layer = _worst_first(findings)
    each = min(count, max(1, (budget - changes.forwards) // (2 * max(1, len(by_layer)))))
    # where the stored statistics of all layers give nothing finite, from the exact ones instead
    stored = as_stored[:each] if math.isfinite(to_exact) else None
    singles: dict[str, dict[str, float | None]] = {}
    for name, found in by_layer.items():
        # whether a severe finding stays so is decided by its effect, whatever that costs
        wanted = changes.forwards < budget or len(singles) < _FEWEST
        asked = {_felt(f.kind) for f in found if wanted or f.severity == "severe"}
        target = targets.get(name)
        if name not in exact:
            asked -= {"stored_to_exact", "stored_to_target"}
            target = None
        if asked:
            layer = next(layer for layer in layers if layer.name == name)
            shifted = None if target is None else exact_statistics(layer, target)
            singles[name] = _of_one(changes, name, asked, exact, shifted, stored, as_exact[:each])
    findings = [_gated(f, singles, to_exact, to_batch) for f in findings]
    return findings + [_single(name, found, each) for name, found in singles.items()]


def _of_one(
    changes: _Changes,
    name: str,
    asked: set[str],
    exact: Choice,
    target: Statistics | None,
    stored: Outputs | None,
    as_exact: Outputs,
) -> dict[str, float | None]:
    """Return the changes of the output by one layer's statistics that are asked for.

    Args:
        stored: the outputs with all layers' stored statistics; None where these are of no use: the
            other layers then have exact ones.
    """
    others: Choice = {}
    base = before = stored if stored is not None else as_exact
    each = len(base)
    if stored is None:
        others = {key: value for key, value in exact.items() if key != name}
        if asked - {"exact_to_batch"}:
            before = changes.run(others, each)
    found: dict[str, float | None] = {}
    if "stored_to_exact" in asked:
        if stored is not None:
            base = changes.run({name: exact[name]}, each)
        found["stored_to_exact"] = changes.between(before, base)
    if "exact_to_batch" in asked:
        by_batch = changes.run({**others, name: "batch"}, each)
        found["exact_to_batch"] = changes.between(base, by_batch)
    if "stored_to_target" in asked and target is not None:
        shifted = changes.run({**others, name: target}, each)
        found["stored_to_target"] = changes.between(before, shifted)
    return found


def _moving_average_factor(layers: Sequence[DiagnosedLayer], records: dict[str, Record]) -> float:
    """Return the error of stored against exact statistics in units of half a sample's.

    Half of B batches is off by the scatter / B, stored statistics by scatter · (1/B + m/(2 - m)).
    """
    factors = [1.0]
    for layer in layers:
        if layer.momentum is not None and not layer.frozen:
            record = records[layer.name]
            uses = max(1, record.uses // layer.rows)
            m = 1 - (1 - layer.momentum) ** uses
            factors.append(1 + record.forwards * m / (2 - m))
    return math.sqrt(max(factors))


def _together(to_exact: float, to_batch: float, chance: float, batches: int) -> Finding:
    certain = not to_exact <= _CHANCE * chance
    severity = severity_of(to_exact, (math.inf, *CHANGE[1:])) if certain else "ok"
    by_batch = severity_of(to_batch, _TO_BATCH)
    severity = max(severity, by_batch, key=SEVERITIES.index)
    what = (
        f"all layers: the output changes by {to_exact:.2f} of its spread from stored to exact "
        f"statistics (chance: {chance:.2f}), by {to_batch:.2f} from exact to mini-batch ones"
    )
    return make(
        "output-effect", "", severity, what, to_exact,
        stored_to_exact=to_exact, exact_to_batch=to_batch, chance=chance, batches=batches,
    )  # fmt: skip


def _felt(kind: str) -> str:
    """Return which change of the output tells whether a finding of a kind matters."""
    if kind in _BY_BATCH:
        return "exact_to_batch"
    return "stored_to_target" if kind == "domain-shift" else "stored_to_exact"


def _single(name: str, changes: dict[str, float | None], batches: int) -> Finding:
    known = {key: value for key, value in changes.items() if value is not None}
    effect = known.get("stored_to_exact", 0.0)
    parts = [f"{value:.2f} from {key.replace('_to_', ' to ')}" for key, value in known.items()]
    what = f"this layer alone changes the output by {', '.join(parts) or 'nothing comparable'}"
    return make(
        "output-effect", name, severity_of(effect, CHANGE), what, effect, **known, batches=batches
    )


def _worst_first(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Return what is not "ok" by layer, the worst layer first."""
    by_layer: dict[str, list[Finding]] = {}
    for finding in sorted(findings, key=lambda f: f.rank):
        if finding.severity != "ok" and finding.layer:
            by_layer.setdefault(finding.layer, []).append(finding)
    return by_layer


def _gated(
    finding: Finding,
    singles: dict[str, dict[str, float | None]],
    to_exact: float,
    to_batch: float,
) -> Finding:
    """Add the output's change to a finding; a severe one that changes nothing is a warning."""
    if finding.kind in _UNGATED or finding.severity == "ok":
        return finding
    key = _felt(finding.kind)
    together = {"exact_to_batch": max(to_exact, to_batch), "stored_to_exact": to_exact}
    change = singles.get(finding.layer, {}).get(key)
    evidence = finding.evidence if change is None else {**finding.evidence, "output_change": change}
    severity = finding.severity
    size = together.get(key, math.inf) if change is None else change
    if severity == "severe" and size < CHANGE[1]:
        severity = "warning"
    so = "" if change is None else f"; alone, it changes the output by {change:.2f} of its spread"
    return dataclasses.replace(
        finding, severity=severity, evidence=evidence, what=finding.what + so
    )
