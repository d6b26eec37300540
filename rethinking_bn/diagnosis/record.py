"""What one layer was given, batch after batch: sums that merge over batches and over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rethinking_bn.diagnosis.layers import DiagnosedLayer
from rethinking_bn.numerics.local_moments import local_moments
from rethinking_bn.numerics.moments import Moments, merge_moments

_BLOCK = 32  # forwards between two merges in float64

# What is summed up. In "even" and "odd" the samples are activations; in the others, forwards.
_SUMS = ("even", "odd", "mean", "var", "apart_mean", "apart_var", "within", "images")


class Record:
    """The moments of a layer's inputs over activations, over images and over forwards.

    The unit of independence is the image: what a statistic's error is follows from the scatter of
    whole batches, and of image means within them, so that the correlation of pixels is included.

    Args:
        layer: whose inputs are recorded, through :meth:`see` and :meth:`end_of_forward`.
    """

    def __init__(self, layer: DiagnosedLayer) -> None:
        self.layer = layer
        self.sums: dict[str, Moments] = {}
        self.not_finite = torch.zeros(layer.channels, dtype=torch.float64)  # forwards, per channel
        self.groups = 1
        self._forwards = 0
        self._now: list[tuple[Tensor, ...]] = []
        self._waiting: list[tuple[Tensor, ...]] = []

    def see(self, tensors: list[Tensor]) -> None:
        """Take in one call of the layer: one use per tensor (N, C, *)."""
        self.groups = max(self.groups, self.layer.groups)
        for x in tensors:
            x = x.detach()
            count, mean, m2 = local_moments(x)
            if len(x) > 1 and x.numel():
                each = x if x.dim() == 2 else x.flatten(2).mean(2, dtype=mean.dtype)
                within = each.to(mean.dtype).var(0)
            else:
                within = torch.zeros_like(mean)
            images = torch.full((), float(len(x) if x.numel() else 0)).to(count)
            self._now.append((count, images, mean, m2, within))

    def end_of_forward(self) -> None:
        """Close a forward of the model: the next call is its first use again."""
        now, self._now = self._now, []
        if now:
            self._waiting.append(tuple(torch.stack(v) for v in zip(*now, strict=True)))
        if len(self._waiting) == _BLOCK:
            self.flush()

    def flush(self) -> None:
        """Merge what waits into the sums."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        uses = max(len(forward[0]) for forward in waiting)
        stacked = [
            torch.stack([_pad(v, uses) for v in values]).cpu().double()
            for values in zip(*waiting, strict=True)
        ]
        self._add(*stacked)

    def _add(self, count: Tensor, images: Tensor, mean: Tensor, m2: Tensor, within: Tensor) -> None:
        """Add K forwards of U uses: (K, U) and (K, U, C)."""
        bad = ~(mean.isfinite() & m2.isfinite()) & (count > 0)[..., None]
        self.not_finite += bad.any(1).sum(0)
        broken = bad.any(2)
        count = count.masked_fill(broken, 0)
        images = images.masked_fill(broken, 0)
        mean, m2, within = (v.masked_fill(broken[..., None], 0) for v in (mean, m2, within))
        if self.layer.mean_square:
            mean, m2 = torch.zeros_like(mean), m2 + count[..., None] * mean.square()
        seen, nothing = (count > 0).double(), torch.zeros_like(mean)
        var = Moments(count, mean, m2).variance(unbiased=not self.layer.mean_square)
        pooled = merge_moments(count, mean, m2, dim=1)
        parity = torch.arange(self._forwards, self._forwards + len(count)) % 2 == 0
        self._forwards += len(count)
        rows = {
            "even": Moments(count[parity], mean[parity], m2[parity]),
            "odd": Moments(count[~parity], mean[~parity], m2[~parity]),
            "mean": Moments(seen, mean, nothing),
            "var": Moments(seen, var, nothing),
            "apart_mean": Moments(seen, mean - pooled.mean[:, None], nothing),
            "apart_var": Moments(seen, var - pooled.variance(unbiased=True)[:, None], nothing),
            "within": Moments((images - 1).clamp(min=0), within, nothing),
            "images": Moments(seen, images[..., None], nothing[..., :1]),
        }
        for name, block in rows.items():
            merged = merge_moments(*block)
            self.sums[name] = _merge(self.sums[name], merged) if name in self.sums else merged

    def state(self) -> Any:
        """Return everything as tensors on the CPU, for other ranks."""
        self.flush()
        return self.sums, self.not_finite, self._forwards, self.groups

    def merge(self, states: list[Any]) -> None:
        """Replace what is here by the merged states of all ranks, the same on each."""
        self.sums, self._forwards = {}, 0
        self.not_finite = torch.zeros_like(self.not_finite)
        for sums, not_finite, forwards, groups in states:
            self.not_finite += not_finite
            self._forwards += forwards
            self.groups = max(self.groups, groups)
            for name, moments in sums.items():
                self.sums[name] = _merge(self.sums[name], moments) if name in self.sums else moments

    @property
    def forwards(self) -> int:
        """Forwards of the model in which the layer was called."""
        return self._forwards

    @property
    def uses(self) -> int:
        """U, uses per forward; 0 when no finite value was seen."""
        return len(self.sums["mean"].count) if self.sums else 0

    def __getitem__(self, name: str) -> Moments:
        """Return the sums called so, U rows."""
        return self.sums[name]

    def exact(self) -> Moments:
        """Return the moments of all activations, U rows."""
        return _merge(self.sums["even"], self.sums["odd"])

    def scatter(self, name: str) -> Tensor:
        """Return the variance over forwards of what is summed up under a name, (U, C)."""
        return self.sums[name].variance(unbiased=True)


def _pad(x: Tensor, uses: int) -> Tensor:
    return torch.cat([x, x.new_zeros(uses - len(x), *x.shape[1:])]) if len(x) < uses else x


def _merge(one: Moments, other: Moments) -> Moments:
    uses = max(len(one.count), len(other.count))
    count, mean, m2 = (
        torch.stack([_pad(a, uses), _pad(b, uses)]) for a, b in zip(one, other, strict=True)
    )
    return merge_moments(count, mean, m2)
