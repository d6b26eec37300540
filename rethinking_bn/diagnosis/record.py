"""One BN-like layer under diagnosis: what it stores, and what it is given, batch after batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rethinking_bn.distributed import get_world_size
from rethinking_bn.layers import MultiDomainBatchNorm2d, SplitBatchNorm2d
from rethinking_bn.layers.bn_like import BatchNormLike, find_bn_like
from rethinking_bn.numerics.moments import Moments, local_moments, merge_moments, statistics_dtype
from rethinking_bn.population.model_state import changed, set_modes
from rethinking_bn.population.observe import TorchLayer, input_of, observe

Statistics = tuple[Tensor, Tensor]  # mean and variance, each (D, C), float64 on the CPU


class DiagnosedLayer:
    """One BN-like layer of a model, watched.

    A *use* is one tensor that the layer normalises in a forward of the model: the k-th call, or
    the level of a list. Use u is normalised at inference by set u mod D of D stored sets.

    Attributes:
        frozen: whether it normalises by stored statistics in training, too.
        apart: whether training normalises each use by statistics of its own.
        observed: how population training reads it; None: it does not.
        from_buffers: whether a training forward leaves the moments of its input in the buffers.
        equal_weights: whether batches count alike, since only the layer knows of which values its
            statistics are (a forward of its own).
        stored: the statistics at construction, D rows; None where there are none.
        unbiased: whether the stored variance is the unbiased one of the values.
        steps: updates that the stored statistics have seen, where the layer counts them.
        ranks: how many ranks' samples are normalised together.
        record: what is told of the layer's calls, within :meth:`watching`.
    """

    record: Any

    def __init__(self, about: BatchNormLike, frozen: bool, depth: int = 0) -> None:
        self.about, self.frozen, self.depth = about, frozen, depth
        self.name, self.layer, self.eps = about.name, about.module, about.eps
        self.momentum, self.mean_square = about.momentum, about.mean_square
        self.by_batch, self.rows = about.by_batch, len(about.domains) or 1
        layer, self._modules = self.layer, list(self.layer.modules())
        shared = isinstance(layer, MultiDomainBatchNorm2d) and layer.train_stats == "shared"
        self.apart = not (frozen or shared or about.mean_square)
        self.observed = None if frozen or not about.domains else observe(about)
        self.from_buffers = isinstance(self.observed, TorchLayer)
        self.equal_weights = self.from_buffers and about.kind == "own"
        self.unbiased = not (self.mean_square or self.equal_weights)
        self.stored = about.read() if about.domains else None
        tensors = layer.state_dict()
        self.channels = next(t for t in tensors.values() if t.dim() == 1).numel()
        counts = [int(t) for n, t in tensors.items() if n.endswith("num_batches_tracked")]
        self.steps = counts[0] if counts else None
        group = getattr(layer, "process_group", None)
        self.ranks = get_world_size(group) if about.pools_ranks else 1

    def set_training(self, training: bool) -> None:
        """Set the mode of the layer and its parts; train() may do more, or refuse."""
        for module in self._modules:
            module.training = training

    @contextmanager
    def using(self, chosen: Statistics | Literal["batch"] | None) -> Iterator[None]:
        """Let the layer normalise by statistics, by the mini-batch, or as it infers (None).

        Statistics are written where it stores its own, and stay there. Modes come back.
        """
        own, modes = self.layer, [(module, module.training) for module in self._modules]
        with ExitStack() as stack:
            stack.callback(set_modes, modes)
            self.set_training(chosen == "batch")
            if chosen == "batch" and self.mean_square:  # its state is more than buffers
                stack.enter_context(own.observing(lambda moments: None))
            elif isinstance(chosen, tuple):
                if self.stored is not None:
                    self.about.write_statistics(*chosen)
                else:
                    mean, var = (value[0].to(next(own.parameters())) for value in chosen)
                    buffers = {"running_mean": mean, "running_var": var}
                    stack.enter_context(changed(own._buffers, buffers))
                if hasattr(own, "batch_stats_at_inference"):
                    stack.enter_context(changed(vars(own), {"batch_stats_at_inference": False}))
            yield

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Tell ``record`` of every call what the layer is given and, if so, the moments it left."""

        def see(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.record.see(self._tensors(input_of(args, kwargs)))

        def left(moments: Moments) -> None:
            if self.from_buffers:
                self.record.left(moments)

        context: Any = nullcontext()
        if self.observed is not None and (self.from_buffers or self.about.kind == "ours"):
            # those of ours change no state meanwhile, and pool as in population training
            context = self.observed.observing(left)
        with self.layer.register_forward_pre_hook(see, with_kwargs=True), context:
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

    Eval mode counts as frozen in a model in training mode. A lazy layer is a ValueError.
    """
    found, moving = find_bn_like(model), ("",) if model.training else ("", "eval mode")
    each = enumerate(found.layers)
    layers = [DiagnosedLayer(about, about.frozen not in moving, depth) for depth, about in each]
    return layers, tuple(map(str, found.left))


def image_means(x: Tensor) -> Tensor:
    """Return the means (N, C) of each image of (N, C, *)."""
    dtype = statistics_dtype(x.dtype)
    return x.flatten(2).mean(2, dtype=dtype) if x.dim() > 2 else x.to(dtype)


def variance(means: Tensor) -> Tensor:
    """Return the unbiased variance (C,) of (N, C), 0 for fewer than two; quicker than torch.var."""
    if len(means) < 2:
        return means.new_zeros(means.shape[1])
    return (means - means.mean(0)).square_().sum(0) / (len(means) - 1)


class Record:
    """The moments of a layer's inputs over activations, over images and over forwards.

    The unit of independence is the image, so that the correlation of pixels is included: errors
    follow from the scatter of whole batches, and of image means within them.

    Attributes:
        sums: by name, U rows, known after :meth:`merge`. In "even" (every second forward) and
            "exact" (all) the samples are activations, images in "within", and forwards in
            "mean", "var", "apart_mean", "apart_var" and "images" (that are normalised together).
        not_finite: (C,) forwards with such values.
        forwards: of the model in which the layer was called.
    """

    def __init__(self, layer: DiagnosedLayer) -> None:
        self.layer = layer
        self.sums: dict[str, Moments] = {}
        self.not_finite = torch.zeros(layer.channels, dtype=torch.float64)
        self.forwards = 0
        # of each use: two numbers of images, (C,) their scatter, then moments (1,), (1, C), (1, C)
        self._now: list[list[Any]] = []
        self._seen: list[list[list[Any]]] = []

    def see(self, tensors: Sequence[Tensor]) -> None:
        """Take in one call of the layer: one use per tensor (N, C, *)."""
        layer = self.layer
        # rows that are normalised apart (MODEL.*.NORM_IMAGES)
        groups = max(1, len(getattr(layer.layer, "_groups", None) or ()))
        for x in map(Tensor.detach, tensors):
            moments: Sequence[Tensor] = ()
            if layer.equal_weights or not x.numel():  # what its images are, the layer alone knows
                means = x.new_zeros(0, layer.channels)
            elif layer.from_buffers:
                means = image_means(x)
            else:  # a channel of an image is a pool: the moments of all in one pass
                each = local_moments(x.reshape(1, -1, *x.shape[2:]))
                means, m2 = each.mean.view(len(x), -1), each.m2.view(len(x), -1)
                moments = merge_moments(each.count.expand(len(x)), means, m2)
            images = len(means), len(means) / groups
            self._now.append([images, variance(means), *moments])

    def left(self, moments: Moments) -> None:
        """Take in the moments (one row) that the layer's last call has left."""
        self._now[-1] += moments

    def end_of_forward(self) -> None:
        """Close a forward of the model: the next call is its first use again."""
        if self._now:
            self._seen.append(self._now)
            self._now = []

    def state(self) -> tuple[int, list[Tensor]]:
        """Return all of it for other ranks, on the CPU: K forwards, and (K, U, ·) of their uses."""
        forwards = len(self._seen)
        whole = [call for calls in self._seen for call in calls if len(call) == 5]
        if not whole:
            return forwards, []
        empty = [(0, 0), *(torch.zeros_like(value) for value in whole[0][1:])]
        uses = max(map(len, self._seen))
        uses += -uses % self.layer.rows
        padded = [[*calls, *[empty] * (uses - len(calls))] for calls in self._seen]
        each = [call if len(call) == 5 else empty for calls in padded for call in calls]
        images, *rest = zip(*each, strict=True)
        values = [torch.tensor(images, dtype=torch.float64), *(torch.stack(v).cpu() for v in rest)]
        return forwards, [v.double().view(forwards, uses, -1) for v in values]

    def merge(self, states: Sequence[tuple[int, list[Tensor]]]) -> Record:
        """Sum up the states of all ranks, the same on each."""
        self.forwards = sum(forwards for forwards, _ in states)
        known = [tensors for _, tensors in states if tensors]
        if not known:
            return self
        most = max(tensors[0].shape[1] for tensors in known)
        values = [  # zeros for uses that a rank did not have
            torch.cat([nn.functional.pad(x, (0, 0, 0, most - x.shape[1])) for x in of_ranks])
            for of_ranks in zip(*known, strict=True)
        ]
        bad = ~(values[3].isfinite() & values[4].isfinite()) & (values[2] > 0)
        self.not_finite = bad.any(1).sum(0).double()
        broken = bad.any(2, keepdim=True)
        images, within, count, mean, m2 = (value.masked_fill(broken, 0) for value in values)
        count, images, together = count[..., 0], images[..., 0], images[..., 1:]
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
            "images": (seen, together, nothing[..., :1]),
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
