"""What a layer's batches say: uses that lie apart, dependent samples, too few of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rethinking_bn.diagnosis.distance import DEAD, pool
from rethinking_bn.diagnosis.findings import Finding, make, severity_of
from rethinking_bn.diagnosis.layers import DiagnosedLayer
from rethinking_bn.diagnosis.record import Record
from rethinking_bn.diagnosis.significance import (
    TOGETHER_LIMIT,
    Verdict,
    f_to_z,
    judge,
    ratio,
    rms,
    to_z,
)
from rethinking_bn.numerics.moments import merge_moments

# note, warning, severe; what they count is said in diagnose's docstring
USES = (0.05, 0.15, 0.4)
DEPENDENCE = (0.02, 0.1, 0.3)
SAMPLES = (64, 16, 4)


def judge_batches(layer: DiagnosedLayer, record: Record) -> Iterator[Finding]:
    """Yield what the batches that a layer was given say, but for frozen layers' own."""
    if record.uses > 1:
        yield _repeated_use(layer, record)
    if not layer.frozen:
        yield _dependent_samples(layer, record)
        yield _small_batch(layer, record)


def _repeated_use(layer: DiagnosedLayer, record: Record) -> Finding:
    """Do uses that training normalises apart share stored statistics, or the other way round?"""
    seen = record["mean"].count
    df = max(float(seen.max()) - 1, 1)
    exact = record.exact()
    pooled = merge_moments(exact.count, exact.mean, exact.m2)
    mean, var = pooled.mean, pooled.variance()
    each = exact.variance()
    z = to_z(torch.zeros_like(mean), df)
    sizes = []
    for use in range(record.uses):
        if seen[use] == 0:
            continue
        for name in ("apart_mean", "apart_var"):
            error = (record.scatter(name)[use] / seen[use]).sqrt()
            z = torch.maximum(z, to_z(ratio(record[name].mean[use], error), df))
        sd = (var + layer.eps).sqrt()
        gain = (each[use] + layer.eps).sqrt() / sd
        sizes.append(((exact.mean[use] - mean) / sd).square() + (gain - 1).square())
    size = torch.stack(sizes).mean(0).sqrt()
    verdict = judge(size, z)
    at_odds = (layer.apart and layer.rows == 1 or not layer.apart and layer.rows > 1) and not (
        layer.frozen or layer.by_batch
    )
    severity = severity_of(verdict.effect, USES) if at_odds else "ok"
    evidence = {
        "uses": record.uses,
        "apart": verdict.effect,
        "z": verdict.z,
        "channels": len(verdict.channels),
        "of": layer.channels,
    }
    how = f"its {record.uses} uses per forward lie {verdict.effect:.2f} standard deviations apart"
    if severity == "ok":
        same = "" if at_odds else ", but training and inference treat them alike"
        return make("repeated-use", layer.name, "ok", how + same, verdict.effect, **evidence)
    so = (
        "training normalises each by itself, inference all by one set of statistics"
        if layer.apart
        else "training normalises them together, inference each by its own statistics"
    )
    what = f"{how} (z {verdict.z:.0f}): {so}"
    return make("repeated-use", layer.name, severity, what, verdict.effect, **evidence)


def _dependent_samples(layer: DiagnosedLayer, record: Record) -> Finding:
    """Do batch means scatter more than means of as many independent images would?"""
    nothing = Verdict(0.0, torch.zeros(0, dtype=torch.long), 0.0)
    judged = [(_scatter(layer, record, use), use) for use in range(record.uses)]
    known = [(verdict, use) for verdict, use in judged if verdict is not None]
    worst, use = max(known, key=lambda pair: (pair[0].effect, pair[0].z), default=(nothing, 0))
    severity = severity_of(worst.effect, DEPENDENCE)
    evidence = {
        "excess": worst.effect,
        "variance_ratio": float(record["ratio"].mean[use]) if known else 1.0,
        "z": worst.z,
        "channels": len(worst.channels),
        "of": layer.channels,
        "together": worst.together,
        **({"use": use} if record.uses > 1 else {}),
    }
    what = (
        f"batch means scatter {worst.effect:.2f} standard deviations more than independent samples "
        f"would (z {worst.z:.0f}, {len(worst.channels)} of {layer.channels} channels): the batch "
        "tells what a sample is, and inference has no such batch"
    )
    if severity == "ok":
        what = f"batch means scatter no more than independent samples' (largest z {worst.z:.1f})"
    return make("dependent-samples", layer.name, severity, what, worst.effect, **evidence)


def _scatter(layer: DiagnosedLayer, record: Record, use: int) -> Verdict | None:
    """Judge the scatter of one use's batch means, channel by channel and all together.

    Channels are judged by F against the normal law; all together by the scatter over batches of
    their mean F, which knows how they are correlated. None where that cannot be known.
    """
    batches = float(record["mean"].count[use])
    df2 = float(record["within"].count[use])
    images = float(record["images"].mean[use])
    within = record["within"].mean[use]
    if batches < 2 or df2 < 1 or images < 2:
        return None
    between = record.scatter("mean")[use]
    f = torch.where(within > 0, images * between / within.clamp(min=1e-30), 1.0)
    z = torch.where(f > 2, f_to_z(f, batches - 1, df2), 0.0)
    var = record.exact().variance()[use] + layer.eps
    excess = ((between - within / images).clamp(min=0) / var).sqrt()
    verdict = judge(excess, z)
    if len(verdict.channels):
        return verdict
    seen = float(record["ratio"].count[use])
    beyond = (record["ratio"].mean[use] - 1).clamp(min=0)
    z = to_z(ratio(beyond, (record.scatter("ratio")[use] / max(seen, 1)).sqrt()), max(seen - 1, 1))
    if float(z) > TOGETHER_LIMIT:
        return Verdict(rms(excess), torch.arange(layer.channels), float(z), True)
    return verdict._replace(z=max(verdict.z, float(z)))


def _small_batch(layer: DiagnosedLayer, record: Record) -> Finding:
    """How many independent samples does a normalisation batch amount to, per channel?"""
    uses = list(range(record.uses))
    parts = [[use] for use in uses] if layer.apart else [uses]
    each = [_samples(layer, record, part) for part in parts]
    samples = min(float(n.median()) for n in each)
    severity = severity_of(-samples, (-SAMPLES[0], -SAMPLES[1], -SAMPLES[2]))
    images = float(record["images"].mean.mean()) * layer.ranks / record.groups
    noise = samples**-0.5 if samples > 0 else float("inf")
    what = (
        f"a normalisation batch of {images:.0f} is worth {samples:.0f} independent samples: its "
        f"mean is off by {noise:.2f} standard deviations, which training sees as noise and "
        "inference does not have"
    )
    if severity == "ok":
        what = f"a normalisation batch is worth {samples:.0f} independent samples"
    return make(
        "small-batch", layer.name, severity, what, noise,
        samples=samples, noise=noise, rows=images, ranks=layer.ranks,
    )  # fmt: skip


def _samples(layer: DiagnosedLayer, record: Record, uses: Sequence[int]) -> Tensor:
    """Return (C,): variance of the values over variance of the normalisation batch's mean.

    Pixels of an image are correlated, so a batch of N is worth something from N to N·H·W. Levels
    of one image are taken as one.
    """
    exact = record.exact()
    chosen = [use for use in uses if record["mean"].count[use] > 0]
    if not chosen:
        return torch.full((layer.channels,), float("inf"), dtype=torch.float64)
    pooled = pool(exact, chosen)
    share = exact.count[chosen] / exact.count[chosen].sum()
    error = torch.zeros(layer.channels, dtype=torch.float64)
    for use, part in zip(chosen, share, strict=True):
        images = float(record["images"].mean[use]) / record.groups
        within = record["within"].mean[use]
        if float(record["within"].count[use]) < 1:  # a single image: the scatter of batches
            within, images = record.scatter("mean")[use], max(images, 1.0)
        error += part * (within / max(images * layer.ranks, 1.0)).sqrt()
    alive = pooled.variance() >= DEAD * layer.eps
    n = pooled.variance() / error.square().clamp(min=1e-30)
    return n[alive] if alive.any() else torch.full_like(n, float("inf"))
