"""Read from every BN-like layer the moments of what it sees, at next to no cost per forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
from rethinking_bn.numerics.moments import Moments, local_moments, merge_moments

_BLOCK = 32  # forwards between two merges in float64


class MomentsAccumulator:
    """The pooled moments of D domains and C channels, in float64."""

    def __init__(self, domains: int, channels: int, device: torch.device) -> None:
        # the one common device without float64
        self.device = torch.device("cpu") if device.type == "mps" else device
        zeros = torch.zeros(domains, channels, dtype=torch.float64, device=self.device)
        self._total = Moments(zeros.new_zeros(domains), zeros, zeros.clone())
        self._waiting: list[Moments] = []

    def add(self, moments: Moments) -> None:
        """Take in one forward's moments (D rows); they are merged some forwards later."""
        self._waiting.append(moments)
        if len(self._waiting) == _BLOCK:
            self._flush()

    def merge(self, block: Moments) -> None:
        """Pool K forwards at once: count (K, D), mean and m2 (K, D, C)."""
        count, mean, m2 = (
            torch.cat([total[None], new.to(self.device, torch.float64)])
            for total, new in zip(self._total, block, strict=True)
        )
        self._total = merge_moments(count, mean, m2)

    def _flush(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            self.merge(Moments(*(torch.stack(rows) for rows in zip(*waiting, strict=True))))

    def total(self) -> Moments:
        """Return the moments of everything taken in so far, float64."""
        self._flush()
        return self._total


class ObservedLayer:
    """A BN-like layer under population training: here, one of the package's own.

    Attributes:
        module: the layer itself.
        old: the statistics at construction, see :meth:`BatchNormLike.read`.
        moments: of what it saw while :meth:`observing`.
    """

    def __init__(self, layer: BatchNormLike) -> None:
        self.layer, self.module = layer, layer.module
        self.old = layer.read()
        rows, channels = self.old[0].shape
        device = next(chain(self.module.buffers(), self.module.parameters())).device
        self.moments = MomentsAccumulator(rows, channels, device)

    def observing(self) -> Any:
        """Return a context in which forwards in training mode add to ``moments``."""
        return self.module.observing(self.moments.add)


class _Hooked(ObservedLayer):
    """A layer that is observed by hooks around its forward."""

    _momentum = 1.0  # with which a forward leaves the statistics of its batch

    @contextmanager
    def observing(self) -> Iterator[None]:
        with ExitStack() as stack:
            for handle in (
                self.module.register_forward_pre_hook(self._before, with_kwargs=True),
                self.module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ):
                stack.callback(handle.remove)
            yield

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        raise NotImplementedError

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Do nothing, unless a subclass does."""

    @contextmanager
    def _moving_at_once(self) -> Iterator[None]:
        """Let a forward leave the statistics of its batch in the buffers."""
        module, names = self.module, ("momentum", "track_running_stats")
        before = {name: vars(module)[name] for name in names if name in vars(module)}
        own = dict(module._buffers)
        try:
            for name in before:
                setattr(module, name, self._momentum if name == "momentum" else True)
            yield
        finally:
            module._buffers.update(own)
            for name, value in before.items():
                setattr(module, name, value)


class TorchLayer(_Hooked):
    """An nn.BatchNorm*d, read through the buffers it writes: no second pass over its input.

    With momentum 1 its forward leaves the batch's mean and unbiased variance in the running
    statistics. During a forward those are scratch tensors, so the layer's own buffers are not
    touched and a NaN in them does not spread.
    """

    @contextmanager
    def observing(self) -> Iterator[None]:
        self._own = dict(self.module._buffers)
        with self._moving_at_once(), super().observing():
            yield

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module.training:
            scratch = torch.zeros_like(self._own["running_mean"]).repeat(2, 1)
            module._buffers["running_mean"], module._buffers["running_var"] = scratch

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        left: dict[str, Any] = dict(module._buffers)
        module._buffers.update(self._own)
        if module.training and output is not None:  # None: the forward failed
            x, device = _input(args, kwargs), self.moments.device
            mean, var = (
                left[name].to(device, torch.float64) for name in ("running_mean", "running_var")
            )
            # back from the unbiased variance; a count of 1 never gets past the layer's forward, and
            # of a count of 0 merging ignores the mean and variance, whatever they are
            count = x.numel() // x.shape[1]
            self.moments.add(_rows(Moments(mean.new_tensor(count), mean, var * (count - 1))))


class _InputLayer(_Hooked):
    """nn.SyncBatchNorm, or half-precision buffers: the input's moments are computed once more.

    What such a layer leaves in its buffers is pooled over ranks, or rounded.
    """

    @contextmanager
    def observing(self) -> Iterator[None]:
        with self._moving_at_once(), super().observing():
            for name, buffer in self.module._buffers.items():
                self.module._buffers[name] = None if buffer is None else buffer.clone()
            yield

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module.training:
            self.moments.add(_rows(local_moments(_input(args, kwargs))))


class OwnForwardLayer(_Hooked):
    """A layer that trains by a forward of its own (masked, split, ghost, norm and activation).

    Only the layer knows which values its statistics are of. With momentum 1 it leaves those of its
    batch in its buffers; as in fvcore's PreciseBN, every batch counts alike, and the variance
    includes the spread of the batches' means. Each forward starts from the statistics that the
    layer had; one that leaves these as they are has seen nothing. A layer that has another momentum
    than its attribute says (a constant, or TensorFlow's 1 - momentum) keeps a share of them, which
    a trial on a copy tells. In ``moments``, count is the number of calls that left something,
    m2 / count the variance.
    """

    def __init__(self, layer: BatchNormLike) -> None:
        super().__init__(layer)
        shares = {momentum: _kept_share(self.module, momentum) for momentum in (1.0, 0.0)}
        self._momentum = min(shares, key=lambda momentum: shares[momentum])
        share = shares[self._momentum]
        self._share = share if share < 1 else 0.0  # it moves nothing at all

    @contextmanager
    def observing(self) -> Iterator[None]:
        with self._moving_at_once(), super().observing():
            buffers = self.module._buffers
            for name, buffer in buffers.items():
                buffers[name] = None if buffer is None else buffer.clone()
            start = (buffers["running_mean"], buffers["running_var"])
            # not a number times 0 is no number
            self._start = [
                torch.where(value.isfinite(), value, neutral)
                for value, neutral in zip(start, (0.0, 1.0), strict=True)
            ]
            yield

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        for name, value in zip(("running_mean", "running_var"), self._start, strict=True):
            module._buffers[name] = value.clone()

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not module.training or output is None:
            return
        mean, var = (module.get_buffer(name) for name in ("running_mean", "running_var"))
        moved = (mean != self._start[0]).any() | (var != self._start[1]).any()
        if self._share:
            mean, var = (
                (left.double() - self._share * start.double()) / (1 - self._share)
                for left, start in zip((mean, var), self._start, strict=True)
            )
        self.moments.add(_rows(Moments(moved.to(mean.dtype), mean, var)))


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


class ThawedLayer(_Hooked):
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
    def observing(self) -> Iterator[None]:
        module = self.module
        self._own = [module.running_mean.clone(), module.running_var.clone()]
        try:
            with super().observing():
                yield
        finally:
            self._after(module, None, None, None)

    def _before(self, module: Any, args: Any, kwargs: Any) -> None:
        local = _rows(local_moments(_input(args, kwargs)))
        self.moments.add(local)
        module.running_mean.copy_(local.mean[0])
        module.running_var.copy_(local.variance()[0])

    def _after(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        # in place: they may be parameters
        module.running_mean.copy_(self._own[0])
        module.running_var.copy_(self._own[1])


def _input(args: Any, kwargs: Any) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _rows(one: Moments) -> Moments:
    return Moments(*(value[None] for value in one))


def observe(layer: BatchNormLike) -> ObservedLayer:
    """Prepare a layer for observation; nothing changes until ``observing`` is entered.

    Raises:
        ValueError: for a constant layer whose statistics are folded into its affine.
    """
    kinds = {"ours": ObservedLayer, "constant": ThawedLayer, "own": OwnForwardLayer}
    return kinds.get(layer.kind, TorchLayer if leaves_moments(layer) else _InputLayer)(layer)


def leaves_moments(layer: BatchNormLike) -> bool:
    """Return whether a training forward can leave its input's exact moments in the buffers."""
    if layer.kind != "torch" or not layer.keeps_statistics:
        return False
    exact = layer.module.running_mean.dtype.itemsize >= 4
    return exact and type(layer.module).forward is _BatchNorm.forward


def layers_to_estimate(model: nn.Module) -> list[BatchNormLike]:
    """Return the BN-like layers whose statistics population training estimates: not the frozen."""
    found, _ = find_bn_like(model)
    return [layer for layer in found if layer.keeps_statistics and not layer.frozen]
