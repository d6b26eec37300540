"""How far statistics are from others, and whether that is more than chance; all of it pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rethinking_bn.diagnosis.record import DiagnosedLayer, Record, Statistics, image_means, variance
from rethinking_bn.numerics.moments import merge_moments

DEAD = 1e-3  # of eps: the variance below which a channel is dead
Z_LIMIT, TOGETHER_LIMIT = 5.0, 4.0  # standard errors: of one channel, of all of a layer together
_SCATTER_LIMIT = 3.5  # of a z among the same images dealt at random, whatever their distribution
_FEWEST = 8  # channels that a judgement together needs
_ROWS, _MOST_ROWS, _CHANNELS = 64, 4096, 64  # of a batch, of all, of a layer
_TRIALS = (50, 100, 100, 100, 100)  # times that images change batches; all of them near the limit


class Verdict(NamedTuple):
    """How far the channels of a layer are off, those that are for certain.

    Attributes:
        effect: root mean square of the sizes over ``channels``, (n,) indices.
        z: the largest.
        together: whether they count as a whole, no single one being certain.
        noise: the same of all channels, beyond what the sample of batches explains.
        row: which of the layer's sets of statistics, or uses, it is about.
    """

    effect: float
    channels: Tensor
    z: float
    together: bool = False
    noise: float = 0.0
    row: int = 0


NOTHING = Verdict(0.0, torch.zeros(0, dtype=torch.long), 0.0)


def judge(size: Tensor, z: Tensor, chance: Tensor | None = None) -> Verdict:
    """Decide which of C channels are off by more than chance, and by how much on average.

    ``chance`` is the size that chance alone gives: where no single channel is certain, all are
    judged together and it is taken off. None: there is no judging together.
    """
    counts = z > Z_LIMIT
    worst = float(z.max()) if len(z) else 0.0
    if counts.any():
        return Verdict(rms(size[counts]), counts.nonzero()[:, 0], worst)
    if chance is not None and len(z) >= _FEWEST and rms(z) > TOGETHER_LIMIT:
        excess = size.square().mean() - chance.square().mean()
        return Verdict(math.sqrt(max(0.0, float(excess))), torch.arange(len(z)), worst, True)
    return NOTHING._replace(z=worst)


def rms(x: Tensor) -> float:
    """Return the root mean square, 0 of none."""
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def to_z(difference: Tensor, error: Tensor, df: float) -> Tensor:
    """Turn Student's t with ``df`` degrees of freedom into a z as improbable, always finite.

    By Wallace's approximation (Annals of Mathematical Statistics 30, 1959), within 1 % far into the
    tail. A difference within 1e-9 of nothing is rounding.
    """
    t = torch.where(difference.abs() < 1e-9, 0.0, difference / error)
    t = t.abs().nan_to_num(0.0, posinf=1e30).clamp(max=1e30)
    return (8 * df + 1) / (8 * df + 3) * (df * torch.log1p(t.square() / df)).sqrt()


def off_by(mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor, eps: float) -> Tensor:
    """Return how far normalising by one pair of statistics is from doing so by another, (C,).

    sqrt(d² + (g - 1)²) with d the distance of the means in standard deviations and g the ratio of
    these, the larger of both directions.
    """
    a, b = ((v.clamp(min=0) + eps).sqrt() for v in (var, other_var))
    d = (mean - other_mean) / torch.minimum(a, b)
    gain = torch.maximum(a / b, b / a)
    return (d.square() + (gain - 1).square()).sqrt()


def by_row(layer: DiagnosedLayer, values: Tensor) -> Tensor:
    """View (U, ·) as (K, D, ·): K uses of each of the D sets of stored statistics."""
    return values.unflatten(0, (-1, layer.rows))


def exact_statistics(layer: DiagnosedLayer, record: Record, which: str = "exact") -> Statistics:
    """Return the mean and variance (D, C) that population training gives on the same batches.

    Rows without a value keep what is stored.
    """
    count, means, m2 = (by_row(layer, values) for values in record[which])
    rows = merge_moments(count, means, m2)
    mean, var = rows.mean, rows.variance(unbiased=layer.unbiased)
    if layer.stored is not None:
        kept = (rows.count < (1 if layer.equal_weights else 2))[:, None]
        mean = torch.where(kept, layer.stored[0], mean)
        var = torch.where(kept, layer.stored[1], var)
    return mean, var


def moving_average_limit(layer: DiagnosedLayer, record: Record) -> Statistics:
    """Return what a moving average settles at: means of the batches' means and variances, (D, C).

    Of a layer called K times a forward, use k weighs (1 - m)^(K - 1 - k).
    """
    seen = (by_row(layer, record["mean"].count) > 0).double()
    later = seen.flip(0).cumsum(0).flip(0) - seen  # uses that come after
    weights = seen * (1 - (layer.momentum or 0.0)) ** later
    weights = (weights / weights.sum(0).clamp(min=1))[..., None]
    mean, var = (by_row(layer, record[name].mean) for name in ("mean", "var"))
    return (weights * mean).sum(0), (weights * var).sum(0)


def sampling_error(layer: DiagnosedLayer, record: Record, *, moving: bool) -> Statistics:
    """Return the standard errors of exact minus stored mean, and of the variances, (D, C).

    By batch scatter s² over B batches: s²/B, and of a moving average with momentum m its own
    error s²·m / (2 - m). K uses of a row are taken as one sample of the same images: errors add
    up, and the average moves by 1 - (1 - m)^K a forward.
    """
    count, batches = (by_row(layer, record[name].count) for name in ("exact", "mean"))
    share = (count / count.sum(0).clamp(min=1))[..., None]
    terms = 1 / batches.amax(0).clamp(min=1)
    if moving and layer.momentum is not None:
        m = 1 - (1 - layer.momentum) ** len(count)
        terms = terms + m / (2 - m)
    elif moving and layer.steps:
        terms = terms + 1 / layer.steps
    mean, var = (
        (share * by_row(layer, record.scatter(name).sqrt())).sum(0) * terms.sqrt()[:, None]
        for name in ("mean", "var")
    )
    return mean, var


def compare_with_stored(layer: DiagnosedLayer, record: Record, *, moving: bool) -> list[Verdict]:
    """Judge each row of the stored statistics against the exact and the moving average's limit.

    The nearer one counts: both are right. With ``moving`` the noise of a moving average counts as
    chance; its size is in ``noise``.
    """
    assert layer.stored is not None
    stored = layer.stored
    errors = sampling_error(layer, record, moving=moving)
    sample = sampling_error(layer, record, moving=False)
    df = max(float(record["mean"].count.max()) - 1, 1)
    exact = exact_statistics(layer, record)
    # the others have findings of their own
    alive = exact[1] >= DEAD * layer.eps
    alive &= stored[0].isfinite() & stored[1].isfinite() & (stored[1] >= 0)
    nearest: list[tuple[float, Verdict]] = [(math.inf, NOTHING)] * layer.rows
    for mean, var in (exact, moving_average_limit(layer, record)):
        sd = (var + layer.eps).sqrt()
        chance, least = (
            ((e[0] / sd) ** 2 + (e[1] / sd**2 / 2) ** 2).sqrt() for e in (errors, sample)
        )
        differences = mean - stored[0], var - stored[1]
        z = torch.maximum(*(to_z(d, e, df) for d, e in zip(differences, errors, strict=True)))
        size = off_by(mean, var, *stored, layer.eps)
        values = (torch.where(alive, value, 0.0) for value in (size, z, chance, least))
        for row, (size, z, chance, least) in enumerate(zip(*values, strict=True)):
            excess = rms(size) ** 2 - rms(least) ** 2
            # five times the error of the sample: statistics that are exact, but of as few other
            # batches, are twice that far off, and few batches leave the error itself uncertain
            noise = math.sqrt(excess) if excess > 4 * rms(least) ** 2 else 0.0
            verdict = judge(size, z, chance)._replace(row=row, noise=noise)
            nearest[row] = min(nearest[row], (rms(size), verdict), key=lambda pair: pair[0])
    return [verdict for _, verdict in nearest]


class Scatter:
    """Do batch means scatter more than those of independent images would? One layer's answer.

    It is asked in forwards in which no BN-like layer mixes a batch: all normalise by constants.
    The comparison is with the same images dealt to batches at random, so that neither the
    correlation of channels nor the shape of their distribution matters.
    """

    def __init__(self, layer: DiagnosedLayer) -> None:
        self.layer = layer
        self.called = False
        self._now = 0
        self._seen: list[list[Tensor]] = []  # by use: image means (N, C) of each batch

    def see(self, tensors: Sequence[Tensor]) -> None:
        """Take in one call of the layer: one use per tensor (N, C, *)."""
        for use, x in enumerate(tensors, self._now):
            if use == len(self._seen):
                self._seen.append([])
            self._seen[use].append(image_means(x.detach()) if x.numel() else x.flatten(1))
        self._now += len(tensors)
        self.called = True

    def end_of_forward(self) -> None:
        """Close a forward of the model: the next call is its first use again."""
        self._now = 0

    def summary(self) -> list[list[Any]]:
        """Return by use: sums that add up over ranks, see :func:`scattering`."""
        found: list[list[Any]] = []
        for batches in self._seen:
            batches = [b.cpu().double() for b in batches if len(b) > 1 and bool(b.isfinite().all())]
            if len(batches) < 2 or self.layer.equal_weights:
                found.append([0.0] * 7)
                continue
            sizes = torch.tensor([float(len(b)) for b in batches], dtype=torch.float64)
            means = torch.stack([b.mean(0) for b in batches])
            between = merge_moments(sizes, means, torch.zeros_like(means)).m2
            within = sum((len(b) - 1) * variance(b) for b in batches)
            freedom = len(batches) - 1.0, float(sizes.sum()) - len(batches)
            z = _against_chance(batches)
            found.append([*freedom, between, within, float(sizes.mean()), z, 1.0])
        return found


def scattering(
    layer: DiagnosedLayer, record: Record, ranks: Sequence[Any]
) -> tuple[Verdict, float]:
    """Return how far the batch means of a use scatter beyond independent images', and the F.

    The effect is the excess in standard deviations of the values. F is the mean over channels of
    N · Var(batch means) / Var(image means within batches), 1 for independent images. ``ranks``
    are their :meth:`Scatter.summary`.
    """
    best = NOTHING, 1.0
    for use in range(min([record.uses, *map(len, ranks)])):
        df1, df2, between, within, images, z, known = (
            sum(values) for values in zip(*(rank[use] for rank in ranks), strict=True)
        )
        if not known or df1 < 1 or df2 < 1:
            continue
        between, within, z = between / df1, within / df2, z / math.sqrt(known)
        var = record["exact"].variance()[use] + layer.eps
        sound = within > 1e-12 * var  # rounding of a constant says nothing
        f = float((between / within.clamp(min=1e-30))[sound].mean()) if sound.any() else 1.0
        excess = (((between - within).clamp(min=0) / (images / known)) / var).sqrt()
        certain = z > _SCATTER_LIMIT and f > 1.5
        effect = rms(excess) if certain else 0.0
        if (effect, z) > (best[0].effect, best[0].z):
            channels = torch.arange(layer.channels if certain else 0)
            best = Verdict(effect, channels, z, certain, row=use), f
    return best


def _against_chance(batches: list[Tensor]) -> float:
    """Return the z of the variance ratio among those of the same images dealt at random.

    Of large batches and layers some rows and channels, evenly spaced, are enough.
    """
    rows = max(2, min(_ROWS, _MOST_ROWS // len(batches)))
    some = [b[:: -(-len(b) // rows)] for b in batches]
    x = torch.cat(some)
    x = x[:, :: -(-x.shape[1] // _CHANNELS)]
    x = x - x.mean(0)
    total = x.square().sum(0)
    x, total = x[:, total > 0], total[total > 0]
    if not len(total):
        return 0.0
    sizes = torch.tensor([float(len(b)) for b in some])
    owner = torch.repeat_interleave(torch.arange(len(some)), sizes.long())
    x = (x / total.sqrt()).float()
    g = torch.Generator().manual_seed(0)
    own = _log_ratios(x, sizes, owner[None])
    dealt = torch.zeros(0)
    for trials in _TRIALS:
        order = torch.rand(trials, len(x), generator=g).argsort(1)
        dealt = torch.cat([dealt, _log_ratios(x, sizes, owner[order])])
        z = float((own - dealt.mean()) / dealt.std().clamp(min=1e-6))
        if not 0.8 < z / _SCATTER_LIMIT < 2:
            break
    return z


def _log_ratios(x: Tensor, sizes: Tensor, owners: Tensor) -> Tensor:
    """Return the log of the variance ratio for each of T ways (T, M) to deal M images."""
    to = (owners + len(sizes) * torch.arange(len(owners))[:, None]).flatten()
    sums = x.new_zeros(len(owners) * len(sizes), x.shape[1])
    sums.index_add_(0, to, x.repeat(len(owners), 1))
    between = (sums.view(len(owners), len(sizes), -1).square() / sizes[:, None]).sum(1)
    return (between / (1 - between).clamp(min=1e-30)).mean(1).log()
