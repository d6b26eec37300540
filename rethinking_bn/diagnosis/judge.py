"""From what was recorded to findings: one function per question, all of them pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rethinking_bn.diagnosis.distance import (
    DEAD,
    Verdict,
    by_row,
    compare_with_stored,
    exact_statistics,
    judge,
    scattering,
    to_z,
)
from rethinking_bn.diagnosis.record import DiagnosedLayer, Record
from rethinking_bn.diagnosis.result import KINDS, LIMITS, SEVERITIES, Finding
from rethinking_bn.numerics.moments import Moments, merge_moments

_FOLDED = -0.5  # correlation below which an affine holds the statistics
_LARGEST_BLOCK = 8  # norm layers
_USUAL = 0.1  # momentum of nn.BatchNorm2d


def make(
    kind: str, layer: str, effect: float, what: str, fine: str = "", *,
    severity: str | None = None, **evidence: Any,
) -> Finding:  # fmt: skip
    """Return a finding, its severity by ``LIMITS`` unless given; of "ok" ones ``fine`` is said."""
    severity = severity_of(effect, LIMITS[kind]) if severity is None else severity
    what = fine if fine and severity == "ok" else what
    return Finding(kind, layer, severity, evidence, "", what, float(effect))


def severity_of(effect: float, limits: tuple[float, float, float]) -> str:
    """Return the severity of an effect by three ascending limits; NaN is severe."""
    if math.isnan(effect):
        return "severe"
    return SEVERITIES[sum(effect >= limit for limit in limits)]


def rank(finding: Finding) -> tuple[int, bool, float, int]:
    """Sort key: the worst first, causes before effects, by the output's change if measured."""
    size = finding.evidence.get("output_change", finding.effect)
    size = math.inf if math.isnan(size) else size
    is_effect = finding.kind == "output-effect"
    return -SEVERITIES.index(finding.severity), is_effect, -size, KINDS.index(finding.kind)


def judge_layer(
    layer: DiagnosedLayer, record: Record, scatter: Sequence[Any], *, idle: bool = False
) -> Iterator[Finding]:
    """Yield what is found at one layer alone.

    ``scatter`` is every rank's summary of the forwards by constants. The statistics of an ``idle``
    layer, one that inference does not call, do not matter.
    """
    yield _non_finite(layer, record)
    if layer.stored is not None:
        yield _impossible(layer)
    if record.uses == 0 or record["exact"].count.sum() == 0:
        return
    yield _dead_channels(layer, record)
    if layer.stored is not None and not layer.by_batch and not idle:
        yield _stored_against(layer, record)
    if record.uses > 1:
        yield _repeated_use(layer, record)
    # of a forward of the layer's own nobody else knows the batch that it normalises by
    if not layer.frozen and not layer.equal_weights:
        yield _dependent_samples(layer, record, scatter)
        yield _small_batch(layer, record)


def _off(layer: DiagnosedLayer, verdict: Verdict) -> dict[str, Any]:
    return {
        "z": verdict.z, "channels": len(verdict.channels), "of": layer.channels,
        "which": verdict.channels[:16].tolist(), "together": verdict.together,
    }  # fmt: skip


def _stored_against(layer: DiagnosedLayer, record: Record) -> Finding:
    """Judge the stored statistics: one of identity, mixed modes (frozen), stale."""
    assert layer.stored is not None
    mean, var = layer.stored
    unit = (mean == 0).all() and ((var - 1).abs() <= 2 * layer.eps).all()
    identity = bool((var == 1).all()) if layer.mean_square else bool(unit)
    kind = "mixed-modes" if layer.frozen else "stale-statistics"
    kind = "identity-statistics" if identity else kind
    moving = not (identity or layer.frozen)
    verdicts = compare_with_stored(layer, record, moving=moving)
    worst = max(verdicts, key=lambda verdict: max(verdict.effect, verdict.noise))
    severity, by_noise = (severity_of(x, LIMITS[kind]) for x in (worst.effect, worst.noise))
    steps, momentum = layer.steps, layer.momentum or 0.0
    evidence = {
        "distance": worst.effect, **_off(layer, worst), "row": worst.row, "steps": steps,
        "constant": layer.about.frozen == "constant",
    }  # fmt: skip
    if identity and layer.frozen and severity != "ok" and _is_folded(layer, record):
        what = "statistics are in the affine"
        return make(kind, layer.name, 0.0, what, severity="ok", folded=True, **evidence)
    # every average has some noise: with a usual momentum less than a warning's is none
    noisy = moving and momentum and worst.noise >= LIMITS[kind][momentum <= _USUAL]
    if noisy and SEVERITIES.index(by_noise) > SEVERITIES.index(severity):
        held = (2 - momentum) / momentum
        batches = f"{held:.0f} batches" if held >= 1.5 else "one batch"
        evidence |= {"distance": worst.noise, "cause": "momentum", "momentum": momentum}
        what = (
            f"momentum {momentum:g}: the average holds {batches}, and its noise takes the stored "
            f"statistics {worst.noise:.2f} standard deviations from the data's"
        )
        return make(kind, layer.name, worst.noise, what, **evidence)
    whose, so = {
        "identity-statistics": ("mean 0 and variance 1, as created,", "does not normalise"),
        "mixed-modes": ("frozen statistics", "and training get features that are not normalised"),
        "stale-statistics": ("stored statistics", "sees other features than training"),
    }[kind]
    what = (
        f"{whose} are {worst.effect:.2f} standard deviations from the data's in "
        f"{len(worst.channels)} of {layer.channels} channels (z {worst.z:.0f}): inference {so}"
    )
    if kind == "stale-statistics" and steps and momentum and (1 - momentum) ** steps > 0.01:
        what += f", after only {steps} updates"
    fine = f"stored statistics fit the data's (largest z {worst.z:.1f})"
    return make(kind, layer.name, worst.effect, what, fine, **evidence)


def _is_folded(layer: DiagnosedLayer, record: Record) -> bool:
    """Return whether the weight is γ / σ, as in converted Caffe2 weights: large for small σ."""
    weight = getattr(layer.layer, "weight", None)
    if weight is None or layer.channels < 8:
        return False
    w = weight.detach().double().cpu().abs().clamp(min=1e-12).log()
    s = exact_statistics(layer, record)[1][0].clamp(min=1e-24).log() / 2
    return bool(w.std() >= 1e-6) and float(torch.corrcoef(torch.stack([w, s]))[0, 1]) < _FOLDED


def _dead_channels(layer: DiagnosedLayer, record: Record) -> Finding:
    mean, var = exact_statistics(layer, record)
    seen = by_row(layer, record["exact"].count).sum(0) > 1
    dead = (var < DEAD * layer.eps) & seen[:, None]
    count = int(dead.any(0).sum())
    harm = 0.0
    if count and layer.stored is not None and not layer.by_batch:
        sd = (layer.stored[1].clamp(min=0) + layer.eps).sqrt()
        harm = float(((mean - layer.stored[0]) / sd).abs().nan_to_num(0.0)[dead].max())
    share = count / layer.channels
    severity = severity_of(harm, LIMITS["dead-channels"]) if count else "ok"
    if severity == "severe" and share < 0.05 or severity == "note" and share >= 0.25:
        severity = "warning"
    what = (
        f"{count} of {layer.channels} channels do not vary; their constant at inference is up to "
        f"{harm:.2f} standard deviations from training's"
    )
    return make(
        "dead-channels", layer.name, max(share, harm), what, "every channel varies",
        severity=severity, channels=count, of=layer.channels, harm=harm,
        which=dead.any(0).nonzero()[:16, 0].tolist(),
    )  # fmt: skip


def _non_finite(layer: DiagnosedLayer, record: Record) -> Finding:
    stored = torch.zeros(layer.channels, dtype=torch.bool)
    if layer.stored is not None:
        stored = ~(layer.stored[0].isfinite() & layer.stored[1].isfinite()).all(0)
    given, batches = record.not_finite > 0, int(record.not_finite.max())
    channels = (stored | given).nonzero()[:, 0]
    what = (
        f"of {layer.channels} channels, {int(stored.sum())} store statistics that are not finite, "
        f"and {int(given.sum())} were given such values, in {batches} of {record.forwards} batches"
    )
    return make(
        "non-finite", layer.name, len(channels), what, "everything is finite",
        channels=len(channels), of=layer.channels, stored=int(stored.sum()), batches=batches,
        which=channels[:16].tolist(),
    )  # fmt: skip


def _impossible(layer: DiagnosedLayer) -> Finding:
    assert layer.stored is not None
    bad = (layer.stored[1] < 0).any(0).nonzero()[:, 0]
    lowest = float(layer.stored[1].nan_to_num(0.0).min())
    what = f"{len(bad)} of {layer.channels} channels store a variance below 0, down to {lowest:.3g}"
    return make(
        "impossible-variance", layer.name, len(bad), what, "variances are possible",
        channels=len(bad), of=layer.channels, lowest=lowest, which=bad[:16].tolist(),
    )  # fmt: skip


def _repeated_use(layer: DiagnosedLayer, record: Record) -> Finding:
    """Do uses that training normalises apart share stored statistics, or the other way round?"""
    batches, exact = record["mean"].count, record["exact"]
    df, used = max(float(batches.max()) - 1, 1), batches > 0
    pooled = merge_moments(*exact)
    z = torch.zeros_like(exact.mean)
    for name in ("apart_mean", "apart_var"):
        error = (record.scatter(name) / batches.clamp(min=1)[:, None]).sqrt()
        z = torch.maximum(z, to_z(record[name].mean, error, df))
    sd = (pooled.variance() + layer.eps).sqrt()
    gain = (exact.variance() + layer.eps).sqrt() / sd
    size = ((exact.mean - pooled.mean) / sd).square() + (gain - 1).square()
    verdict = judge(size[used].mean(0).sqrt(), z[used].amax(0))
    at_odds = layer.apart == (layer.rows == 1) and not (layer.frozen or layer.by_batch)
    what = (
        f"one BatchNorm is used {record.uses} times a forward, on inputs that lie "
        f"{verdict.effect:.2f} standard deviations apart"
    )
    train, infer = "each by its own statistics", "all by one set of statistics"
    train, infer = (train, infer) if layer.apart else (infer, train)
    odds = f" (z {verdict.z:.0f}): training normalises {train}, inference {infer}"
    return make(
        "repeated-use", layer.name, verdict.effect, what + odds,
        what + ("" if at_odds else ", but training and inference treat them alike"),
        severity=None if at_odds else "ok", uses=record.uses, apart=verdict.effect,
        **_off(layer, verdict),
    )  # fmt: skip


def _dependent_samples(layer: DiagnosedLayer, record: Record, scatter: Sequence[Any]) -> Finding:
    """Do batch means scatter more than means of as many independent images would?"""
    verdict, f = scattering(layer, record, scatter)
    what = (
        f"the samples of a batch are alike: batch means scatter {verdict.effect:.2f} standard "
        f"deviations more than those of independent samples (F {f:.1f}, z {verdict.z:.0f}), so "
        "training sees what they have in common and inference does not"
    )
    fine = f"batch means scatter no more than independent samples' (z {verdict.z:.1f})"
    return make(
        "dependent-samples", layer.name, verdict.effect, what, fine,
        excess=verdict.effect, variance_ratio=f, z=verdict.z, use=verdict.row,
    )  # fmt: skip


def _small_batch(layer: DiagnosedLayer, record: Record) -> Finding:
    """How many independent samples does a normalisation batch amount to, per channel?"""
    uses = list(range(record.uses))
    parts = [[use] for use in uses] if layer.apart else [uses]
    each = [float(_samples(layer, record, part).median()) for part in parts]
    # the harmonic mean: a coarse level of few positions is not the whole layer
    samples = len(each) / max(sum(1 / max(n, 1e-9) for n in each), 1e-30)
    images = float(record["images"].mean.mean()) * layer.ranks
    noise = samples**-0.5 if samples > 0 else float("inf")
    fine = f"a normalisation batch is worth {samples:.0f} independent samples"
    what = (
        f"a normalisation batch of {images:.0f} is worth {samples:.0f} independent samples: its "
        f"mean is off by {noise:.2f} standard deviations, noise that inference does not have"
    )
    return make(
        "small-batch", layer.name, noise, what, fine,
        severity=severity_of(-samples, LIMITS["small-batch"]),
        samples=samples, noise=noise, rows=images, ranks=layer.ranks,
    )  # fmt: skip


def _samples(layer: DiagnosedLayer, record: Record, uses: list[int]) -> Tensor:
    """Return (C,): variance of the values over variance of the normalisation batch's mean.

    Pixels are correlated: a batch of N is worth N to N·H·W. Levels of an image are taken as one.
    """
    exact, within, images = (
        Moments(*(value[uses] for value in record[name])) for name in ("exact", "within", "images")
    )
    # a single image: the scatter of batches
    single = (within.count < 1)[:, None]
    scatter = torch.where(single, record.scatter("mean")[uses], within.mean)
    size = torch.where(single, images.mean.clamp(min=1), images.mean) * layer.ranks
    share = (exact.count / exact.count.sum().clamp(min=1))[:, None]
    error = (share * (scatter / size.clamp(min=1)).sqrt()).sum(0)
    variance = merge_moments(*exact).variance()
    alive = variance >= DEAD * layer.eps
    n = variance / error.square().clamp(min=1e-30)
    return n[alive] if alive.any() else torch.full_like(n, float("inf"))


def mixed_blocks(layers: Sequence[DiagnosedLayer]) -> Iterator[Finding]:
    """Yield a finding per block that is frozen in part.

    A block is the smallest module, at most two up, that holds two to eight norm layers.
    """
    seen: set[str] = set()
    for layer in layers:
        parts = layer.name.split(".")
        prefixes = [".".join(parts[:-up]) for up in range(1, min(3, len(parts)))]
        within = {p: [m for m in layers if m.name.startswith(p + ".")] for p in prefixes}
        block = next((p for p in prefixes if len(within[p]) > 1), None)
        if block is None or block in seen or len(within[block]) > _LARGEST_BLOCK:
            continue
        seen.add(block)
        frozen, thawed = ([m.name for m in within[block] if m.frozen is by] for by in (True, False))
        if frozen and thawed:
            what = (
                f"{len(frozen)} of {len(within[block])} layers of the block {block} are frozen "
                f"({', '.join(frozen)}): their statistics stay while those beside them move"
            )
            yield make(
                "mixed-modes", frozen[0], len(frozen) / len(thawed), what, severity="note",
                cause="block", block=block, frozen=frozen, thawed=thawed,
            )  # fmt: skip


def domain_shift(layer: DiagnosedLayer, record: Record) -> Iterator[Finding]:
    """Yield how far the target's statistics are from the stored ones."""
    if layer.stored is None or layer.by_batch or record.uses == 0:
        return
    verdicts = compare_with_stored(layer, record, moving=not layer.frozen)
    worst = max(verdicts, key=lambda verdict: verdict.effect)
    what = (
        f"the target's statistics are {worst.effect:.2f} standard deviations from the stored "
        f"ones in {len(worst.channels)} of {layer.channels} channels (z {worst.z:.0f})"
    )
    fine = f"stored statistics fit the target's (largest z {worst.z:.1f})"
    evidence = {"distance": worst.effect, **_off(layer, worst)}
    yield make("domain-shift", layer.name, worst.effect, what, fine, **evidence)
