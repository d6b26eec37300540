"""One BN-like layer under diagnosis: what it stores, and what it is given, batch after batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rethinking_bn.distributed import get_world_size
from rethinking_bn.layers import MultiDomainBatchNorm2d, SplitBatchNorm2d
from rethinking_bn.layers.bn_like import BatchNormLike, find_bn_like
from rethinking_bn.numerics.moments import Moments, merge_moments, statistics_dtype

Statistics = tuple[Tensor, Tensor]  # mean and variance, each (D, C), float64 on the CPU

_BUFFERS = ("running_mean", "running_var")


class DiagnosedLayer:
    """One BN-like layer of a model, watched.

    A *use* is one tensor that the layer normalises in a forward of the model: the k-th call, or
    the level of a list. Uses share one of D sets of stored statistics, or have one each.

    Attributes:
        about: what the layer is.
        frozen: whether it normalises by stored statistics in training, too.
        apart: whether training normalises each use by statistics of its own.
        from_buffers: whether what a training forward leaves in the buffers is what it normalised
            by, so that the moments of its input need not be computed again.
        equal_weights: whether batches count alike, since only the layer knows of which values its
            statistics are (a forward of its own). Population training does the same.
        stored: the statistics at construction, None where there are none; D rows.
        by_batch: whether inference uses no stored statistics.
        unbiased: whether the stored variance is the unbiased one of the values.
        record: what is told of the layer's calls, within :meth:`watching`.
    """

    record: Any

    def __init__(self, about: BatchNormLike, frozen: bool, depth: int = 0) -> None:
        self.about, self.frozen, self.depth = about, frozen, depth
        self.name, self.layer, self.eps = about.name, about.module, about.eps
        self.momentum, self.mean_square = about.momentum, about.mean_square
        layer = self.layer
        shared = isinstance(layer, MultiDomainBatchNorm2d) and layer.train_stats == "shared"
        self.apart = not (frozen or shared or about.mean_square)
        tracks = bool(about.domains) and getattr(layer, "track_running_stats", True) is not False
        self.equal_weights = about.kind == "own" and tracks and not frozen
        plain = about.kind == "torch" and tracks and not isinstance(layer, nn.SyncBatchNorm)
        exact = plain and layer.running_mean.dtype in (torch.float32, torch.float64)
        self.from_buffers = (exact or self.equal_weights) and not frozen
        self.stored = about.read() if about.domains else None
        self.rows = len(about.domains) or 1
        self.by_batch, self.unbiased = about.by_batch, not (self.mean_square or self.equal_weights)
        tensors = layer.state_dict().values()
        self.channels = int(next(t for t in tensors if t.dim() == 1).numel())

    @property
    def steps(self) -> int | None:
        """Updates that the stored statistics have seen, where the layer counts them."""
        for name, buffer in self.layer.named_buffers():
            if name.endswith("num_batches_tracked"):
                return int(buffer)
        return None

    @property
    def ranks(self) -> int:
        """How many ranks' samples are normalised together."""
        group = getattr(self.layer, "process_group", None)
        return get_world_size(group) if self.about.pools_ranks else 1

    @property
    def groups(self) -> int:
        """How many groups of its rows are normalised apart (MODEL.*.NORM_IMAGES)."""
        return max(1, len(getattr(self.layer, "_groups", None) or ()))

    def normalise_by_batch(self) -> None:
        """Let the layer normalise by mini-batches from now on, unless it is frozen."""
        if not self.frozen:
            # its children too; train() may do more, or refuse
            for module in self.layer.modules():
                module.training = True

    def normalise_by_population(self) -> None:
        """Let the layer normalise by what is in its buffers from now on."""
        for module in self.layer.modules():
            module.training = False

    def state_untouched(self) -> Any:
        """Return a context in which the forwards of a layer of ours in training change no state."""
        ours = self.about.kind == "ours" and self.about.domains and not self.frozen
        # the diagnosis reads the inputs itself
        return self.layer.observing(lambda moments: None) if ours else nullcontext()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Tell ``record`` what the layer is given and what it leaves, call by call.

        ``record.see`` gets the list of (N, C, *), one per domain where rows belong to domains;
        then ``record.left`` the batch's mean and variance, of a layer that leaves them.
        """
        layer, own = self.layer, dict(self.layer._buffers)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.record.see(self._tensors(args[0] if args else next(iter(kwargs.values()))))
            if self.from_buffers and layer.training:
                # with a momentum of 1 the forward leaves the batch's statistics in the buffers
                for name in _BUFFERS:
                    layer._buffers[name] = torch.zeros_like(own[name])

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.from_buffers and layer.training:
                self.record.left(*(layer._buffers[name] for name in _BUFFERS))
                layer._buffers.update(own)

        with ExitStack() as stack:
            stack.enter_context(self.state_untouched())
            if self.from_buffers:
                stack.callback(layer._buffers.update, own)
                stack.callback(setattr, layer, "momentum", layer.momentum)
                layer.momentum = 1.0
            stack.enter_context(layer.register_forward_pre_hook(before, with_kwargs=True))
            stack.enter_context(layer.register_forward_hook(after, with_kwargs=True))
            yield

    def _tensors(self, x: Any) -> list[Tensor]:
        tensors = [x] if isinstance(x, Tensor) else list(x)
        rows = getattr(self.layer, "_rows", None)
        if not isinstance(self.layer, SplitBatchNorm2d) or rows is None:
            return tensors
        domains = range(self.layer.num_domains)
        each = torch.as_tensor([rows] * len(tensors[0]) if isinstance(rows, int) else rows)
        return [t[(each == d).to(t.device)] for t in tensors for d in domains]


def find_layers(model: nn.Module) -> tuple[list[DiagnosedLayer], tuple[str, ...]]:
    """Return every BN-like layer of a model, and in words the modules that are left alone.

    Eval mode counts as frozen in a model that is in training mode.

    Raises:
        ValueError: for a lazy layer that has no size yet.
    """
    found = find_bn_like(model)
    layers = [
        DiagnosedLayer(about, about.frozen not in ("", "eval mode" * (not model.training)), depth)
        for depth, about in enumerate(found.layers)
    ]
    return layers, tuple(map(str, found.left))


def image_means(x: Tensor) -> Tensor:
    """Return the means (N, C) of each image of (N, C, *)."""
    dtype = statistics_dtype(x.dtype)
    return x.flatten(2).mean(2, dtype=dtype) if x.dim() > 2 else x.to(dtype)


@dataclass
class _Call:
    """One use: ``of`` is (mean, M2), each (C,), None until the layer's forward has left it."""

    count: int
    images: int
    within: Tensor
    of: Sequence[Tensor] | None


class Record:
    """The moments of a layer's inputs over activations, over images and over forwards.

    The unit of independence is the image, so that the correlation of pixels is included: errors
    follow from the scatter of whole batches, and of image means within them.

    Attributes:
        sums: by name, U rows, known after :meth:`merge`. In "even" (every second forward) and
            "exact" (all) the samples are activations, images in "within", and forwards in
            "mean", "var", "apart_mean", "apart_var" and "images".
        not_finite: (C,) forwards with such values.
        groups: of rows that are normalised apart.
        forwards: of the model in which the layer was called.
    """

    def __init__(self, layer: DiagnosedLayer) -> None:
        self.layer = layer
        self.sums: dict[str, Moments] = {}
        self.not_finite = torch.zeros(layer.channels, dtype=torch.float64)
        self.groups, self.forwards = 1, 0
        self._now: list[_Call] = []
        self._seen: list[list[_Call]] = []

    def see(self, tensors: Sequence[Tensor]) -> None:
        """Take in one call of the layer: one use per tensor (N, C, *)."""
        leaves = self.layer.from_buffers and self.layer.layer.training
        self.groups = max(self.groups, self.layer.groups)
        for x in tensors:
            x = x.detach()
            if leaves and self.layer.equal_weights:  # what its images are, the layer alone knows
                self._now.append(_Call(1, 0, x.new_zeros(self.layer.channels), None))
                continue
            of, rows = None, len(x)
            if leaves:
                means = image_means(x)
            else:  # the moments of every image in one pass
                means, m2 = _each_image(x)
                count = means.new_full((rows,), float(x[0, 0].numel() if x.numel() else 0))
                _, *of = merge_moments(count, means, m2)
            images = rows if x.numel() else 0
            self._now.append(_Call(x.numel() // self.layer.channels, images, variance(means), of))

    def left(self, mean: Tensor, var: Tensor) -> None:
        """Take in the statistics (C,) that the layer's last call has left."""
        call = self._now[-1]
        # back from the unbiased variance; a single value never gets past torch's forward
        call.of = mean, var * (1 if self.layer.equal_weights else call.count - 1)

    def end_of_forward(self) -> None:
        """Close a forward of the model: the next call is its first use again."""
        if self._now:
            self._seen.append(self._now)
            self._now = []

    def state(self) -> tuple[int, list[Tensor]]:
        """Return all of it for other ranks, on the CPU: (K, U) and (K, U, C) of K forwards."""
        if not self._seen:
            return self.groups, []
        uses = max(map(len, self._seen))
        nothing = torch.zeros_like(self._seen[0][0].within)
        empty = _Call(0, 0, nothing, (nothing, nothing))
        calls = [call for of in self._seen for call in [*of, *[empty] * (uses - len(of))]]
        numbers = torch.tensor([(c.count, c.images) for c in calls], dtype=torch.float64)
        each = [(*(c.of or empty.of), c.within) for c in calls]  # type: ignore[misc]
        tensors = [torch.stack(values).cpu() for values in zip(*each, strict=True)]
        shape = (len(self._seen), uses, -1)
        return self.groups, [*numbers.view(shape).unbind(2), *(t.view(shape) for t in tensors)]

    def merge(self, states: Sequence[tuple[int, list[Tensor]]]) -> Record:
        """Sum up the states of all ranks, the same on each."""
        self.groups = max(groups for groups, _ in states)
        known = [tensors for _, tensors in states if tensors]
        self.forwards = sum(len(tensors[0]) for tensors in known)
        if not known:
            return self
        uses = max(tensors[0].shape[1] for tensors in known)

        def whole(x: Tensor) -> Tensor:  # zeros for uses that a rank did not have
            return torch.cat([x, x.new_zeros(len(x), uses - x.shape[1], *x.shape[2:])], 1).double()

        count, images, mean, m2, within = (
            torch.cat([whole(x) for x in of_ranks]) for of_ranks in zip(*known, strict=True)
        )
        bad = ~(mean.isfinite() & m2.isfinite()) & (count > 0)[..., None]
        self.not_finite = bad.any(1).sum(0).double()
        broken = bad.any(2)
        count, images = count.masked_fill(broken, 0), images.masked_fill(broken, 0)
        mean, m2, within = (v.masked_fill(broken[..., None], 0) for v in (mean, m2, within))
        if self.layer.mean_square:
            mean, m2 = torch.zeros_like(mean), m2 + count[..., None] * mean.square()
        seen, nothing = (count > 0).double(), torch.zeros_like(mean)
        var = Moments(count, mean, m2).variance(unbiased=self.layer.unbiased)
        pooled = merge_moments(count, mean, m2, dim=1)
        apart = var - pooled.variance(unbiased=self.layer.unbiased)[:, None]
        blocks = {
            "even": (count[::2], mean[::2], m2[::2]),
            "exact": (count, mean, m2),
            "mean": (seen, mean, nothing),
            "var": (seen, var, nothing),
            "apart_mean": (seen, mean - pooled.mean[:, None], nothing),
            "apart_var": (seen, apart, nothing),
            "within": ((images - 1).clamp(min=0), within, nothing),
            "images": (seen, images[..., None], nothing[..., :1]),
        }
        self.sums = {name: merge_moments(*block) for name, block in blocks.items()}
        return self

    @property
    def uses(self) -> int:
        """U, uses per forward; 0 when no finite value was seen."""
        return len(self.sums["mean"].count) if self.sums else 0

    def __getitem__(self, name: str) -> Moments:
        """Return the sums called so, U rows."""
        return self.sums[name]

    def scatter(self, name: str) -> Tensor:
        """Return the variance over forwards of what is summed up under a name, (U, C)."""
        return self.sums[name].variance(unbiased=True)


def variance(means: Tensor) -> Tensor:
    """Return the unbiased variance (C,) of (N, C), 0 for fewer than two; quicker than torch.var."""
    if len(means) < 2:
        return means.new_zeros(means.shape[1])
    return (means - means.mean(0)).square_().sum(0) / (len(means) - 1)


def _each_image(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and M2 (N, C) over the positions of each image."""
    if not x.numel():
        nothing = torch.zeros(x.shape[:2], dtype=statistics_dtype(x.dtype), device=x.device)
        return nothing, nothing
    flat = x.flatten(2) if x.dim() > 2 else x[..., None]
    var, mean = torch.var_mean(flat.to(statistics_dtype(x.dtype)), 2, correction=0)
    return mean, var * flat.shape[2]
