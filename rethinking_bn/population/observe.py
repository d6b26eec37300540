"""Read from every BN-like layer the moments of what it sees, at next to no cost per forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rethinking_bn.layers.bn_like import (
    SPACES,
    BatchNormLike,
    bare_copy,
    communicates,
    find_bn_like,
)
from rethinking_bn.numerics.moments import Moments, is_plain, merge_moments, moments_of
from rethinking_bn.population.model_state import changed

Tell = Callable[[Moments], None]

_BLOCK = 32  # forwards between two merges in float64
_STATISTICS = ("running_mean", "running_var")


class ObservedLayer:
    """A BN-like layer whose moments are read: here, one of the package's own.

    Attributes:
        module: the layer itself.
        old: the statistics at construction, see :meth:`BatchNormLike.read`.
    """

    def __init__(self, layer: BatchNormLike) -> None:
        self.layer, self.module, self.old = layer, layer.module, layer.read()
        device = next(chain(self.module.buffers(), self.module.parameters())).device
        # the one common device without float64
        self.device = torch.device("cpu") if device.type == "mps" else device
        zeros = torch.zeros_like(self.old[0], device=self.device)
        self._total = Moments(zeros.new_zeros(len(zeros)), zeros, zeros.clone())
        self._waiting: list[Moments] = []

    def observing(self, tell: Tell | None = None) -> AbstractContextManager[None]:
        """Return a context in which forwards in training mode tell their moments (D rows).

        They are pooled for ``total``, unless ``tell`` takes them.
        """
        return self.module.observing(tell or self._add)  # type: ignore[no-any-return]

    def _add(self, moments: Moments) -> None:
        self._waiting.append(moments)
        if len(self._waiting) == _BLOCK:
            self.total()

    def total(self) -> Moments:
        """Return the pooled moments of all that was seen, float64."""
        if self._waiting:
            rows = zip(self._total, *self._waiting, strict=True)
            self._waiting = []
            count, mean, m2 = (
                torch.cat([total[None], torch.stack(new).to(self.device, torch.float64)])
                for total, *new in rows
            )
            self._total = merge_moments(count, mean, m2)
        return self._total


class _InputLayer(ObservedLayer):
    """nn.SyncBatchNorm, or half-precision buffers: the input's moments are computed once more.

    What such a layer leaves in its buffers is pooled over ranks, or rounded.
    """

    @contextmanager
    def observing(self, tell: Tell | None = None) -> Iterator[None]:
        self._tell = tell or self._add
        with (
            self.module.register_forward_pre_hook(self._before, with_kwargs=True),
            self.module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ):
            yield

    def _before(self, module: Any, args: Any, kwargs: Any) -> None:
        if module.training:
            self._tell(_moments(args, kwargs))

    def _after(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Do nothing, unless a subclass does."""


class TorchLayer(_InputLayer):
    """An nn.BatchNorm*d, read through the buffers it writes: no second pass over its input.

    With momentum 1 its forward leaves the batch's mean and unbiased variance in the running
    statistics. During a forward those are scratch tensors, so the layer's own buffers are not
    touched and a NaN in them does not spread.
    """

    _momentum = 1.0  # with which a forward leaves the statistics of its batch

    @contextmanager
    def observing(self, tell: Tell | None = None) -> Iterator[None]:
        attributes, buffers = vars(self.module), self.module._buffers
        self._own = dict(buffers)
        self._start = self._starts(*(buffers[name] for name in _STATISTICS))
        moving = {"momentum": self._momentum, "track_running_stats": True}
        moving = {name: value for name, value in moving.items() if name in attributes}
        with changed(attributes, moving), changed(buffers, self._own), super().observing(tell):
            yield

    def _starts(self, mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
        """Return what a forward finds in the place of the running statistics."""
        return torch.zeros_like(mean), torch.zeros_like(var)

    def _before(self, module: Any, args: Any, kwargs: Any) -> None:
        if module.training:
            for name, start in zip(_STATISTICS, self._start, strict=True):
                module._buffers[name] = start.clone()

    def _after(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        mean, var = (module._buffers[name] for name in _STATISTICS)
        module._buffers.update(self._own)
        if module.training and output is not None:  # None: the forward failed
            self._tell(self._left(input_of(args, kwargs), mean[None], var[None]))

    def _left(self, x: Tensor, mean: Tensor, var: Tensor) -> Moments:
        """Return the moments of an input by the statistics (1, C) that its forward left."""
        # back from the unbiased variance; a count of 1 never gets past the layer's forward, and of
        # a count of 0 merging ignores the mean and variance, whatever they are
        count = x.numel() // x.shape[1]
        mean, var = (value.to(self.device, torch.float64) for value in (mean, var))
        return Moments(mean.new_tensor([count]), mean, var * (count - 1))


class OwnForwardLayer(TorchLayer):
    """A layer that trains by a forward of its own (masked, split, ghost, norm and activation).

    Only the layer knows which values its statistics are of, so batches count alike, as in fvcore's
    PreciseBN: in the moments, count is the number of calls that left something, and m2 / count the
    variance, the spread of the batches' means included. Each forward starts from the statistics
    that the layer had; one that leaves these as they are has seen nothing. A layer that has another
    momentum than its attribute says (a constant, or TensorFlow's 1 - momentum) keeps a share of
    them, which a trial on a copy tells.
    """

    def __init__(self, layer: BatchNormLike) -> None:
        super().__init__(layer)
        shares = {momentum: _kept_share(self.module, momentum) for momentum in (1.0, 0.0)}
        self._momentum = min(shares, key=lambda momentum: shares[momentum])
        share = shares[self._momentum]
        self._share = share if share < 1 else 0.0  # it moves nothing at all

    def _starts(self, mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
        # not a number times 0 is no number
        return torch.where(mean.isfinite(), mean, 0.0), torch.where(var.isfinite(), var, 1.0)

    def _left(self, x: Tensor, mean: Tensor, var: Tensor) -> Moments:
        moved = (mean != self._start[0]).any() | (var != self._start[1]).any()
        if self._share:
            mean, var = (
                (left.double() - self._share * start.double()) / (1 - self._share)
                for left, start in zip((mean, var), self._start, strict=True)
            )
        return Moments(moved.to(mean.dtype)[None], mean, var)


@torch.no_grad()
def _kept_share(module: nn.Module, momentum: float) -> float:
    """Return the share of its old mean that a training forward keeps; 0 where no copy can run."""
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        for space in () if communicates(module) else SPACES:
            left = []
            try:
                for start in (0.0, 1.0):
                    copied = bare_copy(module).train()
                    vars(copied).update(momentum=momentum, track_running_stats=True)
                    mean = copied.running_mean.fill_(start)
                    copied.forward(mean.new_ones(4, len(mean), *space))
                    left.append(copied.running_mean.mean())
            except Exception:  # whatever a foreign forward raises for such an input
                continue
            share = float(left[1] - left[0])
            return share if 1e-6 < share <= 1 else 0.0
    return 0.0


class ThawedLayer(_InputLayer):
    """A BatchNorm of constant statistics (FrozenBatchNorm2d), which are estimated all the same.

    Meanwhile its forward finds the statistics of its batch in its buffers, so that it normalises as
    the BatchNorm that it once was in training. A ValueError refuses statistics that are folded into
    weight and bias (mean 0, variance 1): any estimate would be put on top of them.
    """

    def __init__(self, layer: BatchNormLike) -> None:
        super().__init__(layer)
        mean, var = self.old
        if not mean.any() and ((var - 1).abs() <= 2 * layer.eps + 1e-12).all():
            raise ValueError(
                f"{layer.name}: its mean is 0 and its variance 1. Either its statistics are folded "
                "into weight and bias, and nothing can or need be estimated (thaw=False), or it "
                "never had any: then load weights with statistics, or train it as BatchNorm "
                '(convert_norms(model, "BN"))'
            )

    @contextmanager
    def observing(self, tell: Tell | None = None) -> Iterator[None]:
        self._own = [getattr(self.module, name).clone() for name in _STATISTICS]
        with super().observing(tell):
            yield

    def _before(self, module: Any, args: Any, kwargs: Any) -> None:
        local = _moments(args, kwargs)
        self._tell(local)
        # in place, for they may be parameters
        module.running_mean.copy_(local.mean[0])
        module.running_var.copy_(local.variance()[0])

    def _after(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        module.running_mean.copy_(self._own[0])
        module.running_var.copy_(self._own[1])


def input_of(args: Any, kwargs: Any) -> Any:
    """Return what a layer is called with."""
    return args[0] if args else next(iter(kwargs.values()))


def _moments(args: Any, kwargs: Any) -> Moments:
    x = input_of(args, kwargs)
    return moments_of([x], is_plain(x))


def observe(layer: BatchNormLike) -> ObservedLayer:
    """Prepare a layer for observation; nothing changes until ``observing`` is entered.

    Raises:
        ValueError: for a constant layer whose statistics are folded into its affine.
    """
    kinds = {"ours": ObservedLayer, "constant": ThawedLayer, "own": OwnForwardLayer}
    if layer.kind in kinds:
        return kinds[layer.kind](layer)
    exact = layer.module.running_mean.dtype.itemsize >= 4
    plain = type(layer.module).forward is _BatchNorm.forward
    return TorchLayer(layer) if exact and plain else _InputLayer(layer)


def layers_to_estimate(model: nn.Module) -> list[BatchNormLike]:
    """Return the BN-like layers whose statistics population training estimates: not the frozen."""
    return [la for la in find_bn_like(model).layers if la.keeps_statistics and not la.frozen]
