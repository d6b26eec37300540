"""The exact population statistics of a layer, and how far the stored ones are from them."""

from __future__ import annotations

import torch
from torch import Tensor

from rethinking_bn.diagnosis.layers import DiagnosedLayer, Statistics
from rethinking_bn.diagnosis.record import Record
from rethinking_bn.diagnosis.significance import Verdict, judge, off_by, ratio, rms, to_z
from rethinking_bn.numerics.moments import Moments, merge_moments

DEAD = 1e-3  # of eps: the variance below which a channel is dead


def exact_statistics(layer: DiagnosedLayer, record: Record, half: str = "") -> Statistics:
    """Return the exact population mean and unbiased variance (D, C), of one half if asked for.

    Rows without a value keep what is stored.
    """
    moments = record[half] if half else record.exact()
    rows = by_row(layer, record, moments)
    mean, var = rows.mean, rows.variance(unbiased=not layer.mean_square)
    if layer.stored is not None:
        kept = (rows.count < 2)[:, None]
        mean = torch.where(kept, layer.stored[0], mean)
        var = torch.where(kept, layer.stored[1], var)
    return mean, var


def pool(moments: Moments, uses: Tensor | list[int]) -> Moments:
    """Pool some uses into one set of moments."""
    return merge_moments(moments.count[uses], moments.mean[uses], moments.m2[uses])


def by_row(layer: DiagnosedLayer, record: Record, moments: Moments) -> Moments:
    """Pool uses that share a row of the stored statistics."""
    uses = [layer.row_of(use) for use in range(record.uses)]
    rows = []
    for row in range(layer.rows):
        chosen = torch.tensor([use for use, of in enumerate(uses) if of == row], dtype=torch.long)
        rows.append(pool(moments, chosen))
    return Moments(*(torch.stack(values) for values in zip(*rows, strict=True)))


def moving_average_limit(layer: DiagnosedLayer, record: Record) -> Statistics:
    """Return what a moving average settles at: means of the batches' means and variances, (D, C).

    Of a layer called K times a forward, the last call weighs most: use k has (1 - m)^(K - 1 - k).
    The spread of the batch means, which the exact variance has, is not in it.
    """
    keep = 1 - (layer.momentum or 0.0)
    means, variances = [], []
    for row in range(layer.rows):
        uses = [u for u in range(record.uses) if layer.row_of(u) == row and record["mean"].count[u]]
        weights = torch.tensor([keep ** (len(uses) - 1 - k) for k in range(len(uses))])
        weights = (weights / weights.sum()).double()[:, None]
        means.append((weights * record["mean"].mean[uses]).sum(0))
        variances.append((weights * record["var"].mean[uses]).sum(0))
    return torch.stack(means), torch.stack(variances)


def sampling_error(layer: DiagnosedLayer, record: Record, *, moving: bool) -> Statistics:
    """Return the standard errors of exact minus stored mean, and of the variances, (D, C).

    By batch scatter s² over B batches: s²/B, and of a moving average with momentum m its own
    error s²·m / (2 - m). K uses of a row are taken as one sample of the same images: errors add
    up, and the average moves by 1 - (1 - m)^K a forward.
    """
    out = []
    for name in ("mean", "var"):
        errors = []
        for row in range(layer.rows):
            uses = [u for u in range(record.uses) if layer.row_of(u) == row]
            share = record.exact().count[uses]
            share = (share / share.sum().clamp(min=1))[:, None]
            error = (share * record.scatter(name)[uses].sqrt()).sum(0)
            batches = float(record[name].count[uses].max())
            terms = 1 / max(batches, 1)
            if moving and layer.momentum is not None:
                m = 1 - (1 - layer.momentum) ** len(uses)
                terms += m / (2 - m)
            elif moving and layer.steps:
                terms += 1 / layer.steps
            errors.append(error * terms**0.5)
        out.append(torch.stack(errors))
    return out[0], out[1]


def compare_with_stored(layer: DiagnosedLayer, record: Record, *, moving: bool) -> list[Verdict]:
    """Judge each row of the stored statistics against the exact and the moving average's limit.

    The nearer one counts: stored statistics may come from population training or from a moving
    average, and both are right.
    """
    assert layer.stored is not None
    errors = sampling_error(layer, record, moving=moving)
    df = max(float(record["mean"].count.max()) - 1, 1)
    # the others have findings of their own
    alive = exact_statistics(layer, record)[1] >= DEAD * layer.eps
    alive &= layer.stored[0].isfinite() & layer.stored[1].isfinite() & (layer.stored[1] >= 0)
    verdicts = []
    for row in range(layer.rows):
        candidates = []
        for mean, var in (exact_statistics(layer, record), moving_average_limit(layer, record)):
            stored = layer.stored[0][row], layer.stored[1][row]
            size = off_by(mean[row], var[row], stored[0], stored[1], layer.eps)
            z = torch.maximum(
                to_z(ratio(mean[row] - stored[0], errors[0][row]), df),
                to_z(ratio(var[row] - stored[1], errors[1][row]), df),
            )
            sd = (var[row] + layer.eps).sqrt()
            chance = ((errors[0][row] / sd) ** 2 + (errors[1][row] / sd**2 / 2) ** 2).sqrt()
            size = size.nan_to_num(0.0).masked_fill(~alive[row], 0.0)
            z = z.masked_fill(~alive[row], 0.0)
            candidates.append((rms(size), judge(size, z, chance)))
        verdicts.append(min(candidates, key=lambda pair: pair[0])[1])
    return verdicts
