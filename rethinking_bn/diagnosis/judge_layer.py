"""From a layer's record to findings: one function per question, all of them pure."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rethinking_bn.diagnosis.distance import (
    DEAD,
    by_row,
    compare_with_stored,
    exact_statistics,
)
from rethinking_bn.diagnosis.findings import Finding, make, severity_of
from rethinking_bn.diagnosis.judge_batches import judge_batches
from rethinking_bn.diagnosis.layers import DiagnosedLayer
from rethinking_bn.diagnosis.record import Record

# note, warning, severe; what they count is said in diagnose's docstring
DISTANCE = (0.05, 0.15, 0.5)
_FOLDED = -0.5  # correlation below which an affine holds the statistics


def judge_layer(layer: DiagnosedLayer, record: Record) -> Iterator[Finding]:
    """Yield what a layer's own numbers say, but for what other layers or data are needed for."""
    yield from _non_finite(layer, record)
    yield from _impossible(layer)
    if record.uses == 0 or record.exact().count.sum() == 0:
        return
    yield from _dead_channels(layer, record)
    if layer.stored is not None and not layer.by_batch:
        yield _stored_against(layer, record)
    yield from judge_batches(layer, record)


def _stored_against(layer: DiagnosedLayer, record: Record) -> Finding:
    """Judge the stored statistics: one of identity, mixed modes (frozen), stale."""
    assert layer.stored is not None
    mean, var = layer.stored
    unit = (mean == 0).all() and ((var - 1).abs() <= 2 * layer.eps).all()
    identity = bool(unit) if not layer.mean_square else bool((var == 1).all())
    identity = identity and layer.channels > 0
    verdicts = compare_with_stored(layer, record, moving=not (identity or layer.frozen))
    row, worst = max(enumerate(verdicts), key=lambda pair: pair[1].effect)
    kind = "identity-statistics" if identity else "stale-statistics"
    if layer.frozen and not identity:
        kind = "mixed-modes"
    severity = severity_of(worst.effect, DISTANCE)
    folded = identity and layer.frozen and severity != "ok" and _is_folded(layer, record)
    evidence = {
        "distance": worst.effect,
        "z": worst.z,
        "channels": len(worst.channels),
        "of": layer.channels,
        "which": worst.channels[:16].tolist(),
        "together": worst.together,
        **({"row": row} if layer.rows > 1 else {}),
        **({"steps": layer.steps} if layer.steps is not None else {}),
        **({"folded": True} if folded else {}),
    }
    far = (
        f"{worst.effect:.2f} standard deviations from the data's in {len(worst.channels)} of "
        f"{layer.channels} channels (z {worst.z:.0f})"
    )
    if folded:
        return make(kind, layer.name, "ok", "statistics are in the affine", 0.0, **evidence)
    what = {
        "identity-statistics": f"mean 0 and variance 1, as created, are {far}: inference does not "
        "normalise",
        "mixed-modes": f"frozen statistics are {far}: training and inference get features that are "
        "not normalised",
        "stale-statistics": f"stored statistics are {far}: inference sees other features than "
        "training",
    }[kind]
    steps, momentum = layer.steps, layer.momentum
    if kind == "stale-statistics" and steps and momentum and (1 - momentum) ** steps > 0.01:
        what += f", after only {steps} updates"
    if severity == "ok":
        what = f"stored statistics fit the data's (largest z {worst.z:.1f})"
    return make(kind, layer.name, severity, what, worst.effect, **evidence)


def _is_folded(layer: DiagnosedLayer, record: Record) -> bool:
    """Return whether an affine makes up for identity statistics, as in converted Caffe2 weights.

    There the weight is γ / σ: large where the data's deviation is small.
    """
    weight = getattr(layer.layer, "weight", None)
    if weight is None or layer.channels < 8:
        return False
    w = weight.detach().double().cpu().abs().clamp(min=1e-12).log()
    s = exact_statistics(layer, record)[1][0].clamp(min=1e-24).log() / 2
    if w.std() < 1e-6:
        return False
    return float(torch.corrcoef(torch.stack([w, s]))[0, 1]) < _FOLDED


def _dead_channels(layer: DiagnosedLayer, record: Record) -> Iterator[Finding]:
    mean, var = exact_statistics(layer, record)
    dead = (var < DEAD * layer.eps) & (by_row(layer, record, record.exact()).count > 1)[:, None]
    count = int(dead.any(0).sum())
    if not count:
        yield make("dead-channels", layer.name, "ok", "every channel varies", 0.0, channels=0)
        return
    shift = torch.zeros_like(mean)
    if layer.stored is not None and not layer.by_batch:
        sd = (layer.stored[1].clamp(min=0) + layer.eps).sqrt()
        shift = ((mean - layer.stored[0]) / sd).abs().nan_to_num(0.0)
    harm = float(shift[dead].max())
    share = count / layer.channels
    severity = "warning" if harm >= DISTANCE[1] or share >= 0.25 else "note"
    if harm >= DISTANCE[2] and share >= 0.05:
        severity = "severe"
    what = (
        f"{count} of {layer.channels} channels do not vary; inference makes them a constant "
        f"{harm:.2f} from training's"
    )
    yield make(
        "dead-channels", layer.name, severity, what, max(share, harm),
        channels=count, of=layer.channels, harm=harm,
        which=dead.any(0).nonzero()[:16, 0].tolist(),
    )  # fmt: skip


def _non_finite(layer: DiagnosedLayer, record: Record) -> Iterator[Finding]:
    stored = torch.zeros(layer.channels, dtype=torch.bool)
    if layer.stored is not None:
        stored = ~(layer.stored[0].isfinite() & layer.stored[1].isfinite()).all(0)
    given = record.not_finite > 0
    channels = (stored | given).nonzero()[:, 0]
    if not len(channels):
        yield make("non-finite", layer.name, "ok", "everything is finite", 0.0, channels=0)
        return
    what = (
        f"{int(stored.sum())} channels have stored statistics that are not finite; "
        f"{int(given.sum())} of {layer.channels} channels were given values that are not, in "
        f"{int(record.not_finite.max())} of {record.forwards} batches: all that follows is lost"
    )
    yield make(
        "non-finite", layer.name, "severe", what, float(len(channels)),
        channels=len(channels), of=layer.channels, stored=int(stored.sum()),
        batches=int(record.not_finite.max()), which=channels[:16].tolist(),
    )  # fmt: skip


def _impossible(layer: DiagnosedLayer) -> Iterator[Finding]:
    if layer.stored is None:
        return
    bad = (layer.stored[1] < 0).any(0).nonzero()[:, 0]
    if not len(bad):
        yield make("impossible-variance", layer.name, "ok", "variances are possible", 0.0)
        return
    lowest = float(layer.stored[1].nan_to_num(0.0).min())
    what = (
        f"{len(bad)} of {layer.channels} channels store a negative variance, down to {lowest:.3g}"
    )
    yield make(
        "impossible-variance", layer.name, "severe", what, float(len(bad)),
        channels=len(bad), of=layer.channels, lowest=lowest, which=bad[:16].tolist(),
    )  # fmt: skip
