"""What one layer was given, batch after batch: sums that merge over batches and over ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rethinking_bn.diagnosis.layers import DiagnosedLayer
from rethinking_bn.layers.bn_like import find_bn_like
from rethinking_bn.numerics.channels import statistics_dtype
from rethinking_bn.numerics.moments import Moments, local_moments, merge_moments
from rethinking_bn.population.observe import MomentsAccumulator, TorchLayer, leaves_moments

_BLOCK = 32  # forwards that are merged at once in float64


@dataclass
class _Call:
    """One use: values per channel, images, the variance of their means, and (mean, M2), each (C,).

    The last is None until the layer's forward has left it.
    """

    count: int
    images: int
    within: Tensor
    of: Sequence[Tensor] | None


class _CallByCall(MomentsAccumulator):
    """Hands the moments of every call on, instead of pooling them."""

    def __init__(self, calls: deque[_Call], device: torch.device) -> None:
        super().__init__(1, 0, device)
        self._calls = calls

    def merge(self, block: Moments) -> None:
        """Take in K calls: mean and m2 (K, 1, C)."""
        for mean, m2 in zip(block.mean[:, 0], block.m2[:, 0], strict=True):
            self._calls.popleft().of = (mean, m2)


class Record:
    """The moments of a layer's inputs over activations, over images and over forwards.

    The unit of independence is the image: what a statistic's error is follows from the scatter of
    whole batches, and of image means within them, so that the correlation of pixels is included.
    One pass over an input gives its image means; the moments come from the layer's own forward
    where that leaves them in its buffers, else from the same pass.

    Args:
        layer: whose inputs are recorded, within :meth:`watching`.

    Attributes:
        sums: by name, U rows. In "even" and "odd" (forwards) the samples are activations, and
            images in "within"; in "mean", "var", "apart_mean", "apart_var", "images" and "ratio",
        forwards.
        not_finite: (C,) forwards with such values.
        groups: of rows that are normalised apart.
    """

    def __init__(self, layer: DiagnosedLayer) -> None:
        self.layer = layer
        self.sums: dict[str, Moments] = {}
        self.not_finite = torch.zeros(layer.channels, dtype=torch.float64)
        self.groups = 1
        self._forwards = 0
        self._exact: Moments | None = None
        self._now: list[_Call] = []
        self._waiting: list[list[_Call]] = []
        self._to_come: deque[_Call] = deque()  # calls whose moments the layer will leave

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record every call of the layer; its forwards in training change no state meanwhile."""
        layer = self.layer
        with ExitStack() as stack:
            found = [] if layer.frozen else find_bn_like(layer.layer).layers
            if found and leaves_moments(found[0]):
                observed = TorchLayer(found[0])
                observed.moments = _CallByCall(self._to_come, layer.stored_on())
                stack.enter_context(observed.observing())
                stack.enter_context(layer.watching(partial(self._see, leaves=True)))
            else:
                stack.enter_context(layer.state_untouched())
                stack.enter_context(layer.watching(self._see))
            yield

    def _see(self, tensors: Sequence[Tensor], leaves: bool = False) -> None:
        """Take in one call of the layer: one use per tensor (N, C, *).

        Args:
            leaves: whether its forward leaves the moments, if it is in training mode by then.
        """
        leaves = leaves and self.layer.layer.training
        self.groups = max(self.groups, self.layer.groups)
        for x in tensors:
            x, (rows, channels) = x.detach(), x.shape[:2]
            of = None
            if leaves:
                dtype = statistics_dtype(x.dtype)
                mean = x.flatten(2).mean(2, dtype=dtype) if x.dim() > 2 else x.to(dtype)
            else:  # as so many channels: the moments of every image in one pass
                count, mean, m2 = local_moments(x.flatten(0, 1)[None])
                mean, m2 = mean.view(rows, channels), m2.view(rows, channels)
                _, *of = merge_moments(count.expand(rows), mean, m2)
            images = rows if x.numel() else 0
            self._now.append(_Call(x.numel() // channels, images, _variance(mean), of))
        if leaves:
            self._to_come += self._now[-len(tensors) :]

    def end_of_forward(self) -> None:
        """Close a forward of the model: the next call is its first use again."""
        if self._now:
            self._waiting.append(self._now)
            self._now = []
        if len(self._waiting) == 2 * _BLOCK:  # the moments of the first half have come by now
            self._flush(_BLOCK)

    def _flush(self, forwards: int) -> None:
        """Merge the first forwards that wait into the sums."""
        done, self._waiting = self._waiting[:forwards], self._waiting[forwards:]
        if not done:
            return
        uses = max(len(calls) for calls in done)
        nothing = torch.zeros_like(done[0][0].within)
        empty = _Call(0, 0, nothing, (nothing, nothing))
        calls = [call for of in done for call in [*of, *[empty] * (uses - len(of))]]
        numbers = torch.tensor([(c.count, c.images) for c in calls], dtype=torch.float64)
        means, m2s = zip(*(c.of or empty.of for c in calls), strict=True)
        tensors = [means, m2s, [c.within for c in calls]]
        self._add(
            *numbers.view(len(done), uses, 2).unbind(2),
            *(_stack(values).view(len(done), uses, -1) for values in tensors),
        )

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
            "ratio": _variance_ratio(images, mean, within),
        }
        for name, block in rows.items():
            merged = merge_moments(*block)
            self.sums[name] = _merge(self.sums[name], merged) if name in self.sums else merged

    def state(self) -> Any:
        """Return everything as tensors on the CPU, for other ranks."""
        self._flush(len(self._waiting))
        return self.sums, self.not_finite, self._forwards, self.groups

    def merge(self, states: list[Any]) -> None:
        """Replace what is here by the merged states of all ranks, the same on each."""
        self.sums, self._forwards, self._exact = {}, 0, None
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
        if self._exact is None:
            self._exact = _merge(self.sums["even"], self.sums["odd"])
        return self._exact

    def scatter(self, name: str) -> Tensor:
        """Return the variance over forwards of what is summed up under a name, (U, C)."""
        return self.sums[name].variance(unbiased=True)


def _variance(mean: Tensor) -> Tensor:
    """Return the unbiased variance (C,) of (N, C), 0 for fewer than two; quicker than torch.var."""
    if len(mean) < 2:
        return mean.new_zeros(mean.shape[1])
    return (mean - mean.mean(0)).square_().sum(0) / (len(mean) - 1)


def _variance_ratio(images: Tensor, mean: Tensor, within: Tensor) -> Moments:
    """Return the moments (U, 1) of each forward's N · (mean - all forwards')² / within.

    That is averaged over the channels, whose correlation the scatter over forwards thus includes,
    and scaled so that independent normal images are expected to give 1.

    Args:
        images: (K, U), 0 where there is no such use.
        mean, within: (K, U, C).
    """
    used = images > 1
    forwards, freedom = used.sum(0), (images - 1).clamp(min=0).sum(0)
    weight = used.double()[..., None]
    centre = (weight * mean).sum(0) / forwards.clamp(min=1)[:, None]
    spread = ((images - 1).clamp(min=0)[..., None] * within).sum(0) / freedom.clamp(min=1)[:, None]
    sound = spread > 1e-12 * centre.square()  # a constant's rounding says nothing
    ratio = images[..., None] * (mean - centre).square() / spread.clamp(min=1e-300) * sound
    scale = forwards / (forwards - 1).clamp(min=1) * (1 - 2 / freedom.clamp(min=3))
    each = ratio.sum(2) / sound.sum(1).clamp(min=1) * scale
    known = used & (forwards > 1) & (freedom > 4) & sound.any(1)
    return Moments(known.double(), each[..., None], torch.zeros_like(each)[..., None])


def _stack(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([v.to(values[0]) for v in values]).cpu().double()


def _pad(x: Tensor, uses: int) -> Tensor:
    return torch.cat([x, x.new_zeros(uses - len(x), *x.shape[1:])]) if len(x) < uses else x


def _merge(one: Moments, other: Moments) -> Moments:
    uses = max(len(one.count), len(other.count))
    count, mean, m2 = (
        torch.stack([_pad(a, uses), _pad(b, uses)]) for a, b in zip(one, other, strict=True)
    )
    return merge_moments(count, mean, m2)
