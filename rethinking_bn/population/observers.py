"""Read from every BN-like layer the moments of what it sees, at next to no cost per forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from rethinking_bn.layers.population_layer import PopulationLayer
from rethinking_bn.numerics.moments import Moments, local_moments, merge_moments
from rethinking_bn.numerics.normalize import normalize

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

    Args:
        name: in the model.
        layer: see PopulationLayer.
    """

    def __init__(self, name: str, layer: Any) -> None:
        self.name, self.layer = name, layer
        self.old = self.read()
        rows, channels = self.old[0].shape
        device = next(layer.buffers()).device
        self.moments = MomentsAccumulator(rows, channels, device)

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the D sets of statistics."""
        return self.layer.population_domains

    def observing(self) -> Any:
        """Return a context in which forwards in training mode add to ``moments``."""
        return self.layer.observing(self.moments.add)

    def read(self) -> tuple[Tensor, Tensor]:
        """Return copies of the population mean and variance, (D, C) in float64 on the CPU."""
        mean, var = self.layer.read_population()
        # two steps: there are devices without float64
        return mean.detach().cpu().double().clone(), var.detach().cpu().double().clone()

    def write(self, moments: Moments) -> None:
        """Write the statistics in place; D rows on the CPU in float64."""
        self.layer.write_population(moments.to(self.moments.device))


class TorchLayer(ObservedLayer):
    """An nn.BatchNorm*d, read through the buffers it writes: no second pass over its input.

    With momentum 1 its forward leaves the batch's mean and unbiased variance in the running
    statistics. During a forward those are rows of a scratch tensor, so the layer's own buffers are
    not touched and a NaN in them does not spread.
    """

    @property
    def domains(self) -> tuple[str, ...]:
        return ("",)

    def read(self) -> tuple[Tensor, Tensor]:
        buffers = (self.layer.running_mean, self.layer.running_var)
        mean, var = (b.detach().cpu().double()[None].clone() for b in buffers)
        return mean, var

    def write(self, moments: Moments) -> None:
        count = moments.count.item()
        if count > 0:
            self.layer.running_mean.copy_(moments.mean[0])
        if count > 1:
            self.layer.running_var.copy_(moments.variance(unbiased=True)[0])

    @contextmanager
    def observing(self) -> Iterator[None]:
        layer, self._own = self.layer, dict(self.layer._buffers)
        with ExitStack() as stack:
            stack.callback(self._take_block)
            stack.callback(layer._buffers.update, self._own)
            stack.callback(setattr, layer, "momentum", layer.momentum)
            layer.momentum = 1.0
            self._new_block()
            for handle in (
                layer.register_forward_pre_hook(self._before, with_kwargs=True),
                layer.register_forward_hook(self._after, with_kwargs=True),
            ):
                stack.callback(handle.remove)
            yield

    def _new_block(self) -> None:
        mean = self.layer.running_mean
        self._scratch = torch.zeros(2, _BLOCK, len(mean), dtype=mean.dtype, device=mean.device)
        self._counts: list[int] = []

    def _take_block(self) -> None:
        seen = len(self._counts)
        if seen:
            device = self.moments.device
            mean, var = self._scratch[:, :seen].to(device, torch.float64).unsqueeze(2)
            count = torch.tensor(self._counts, dtype=torch.float64).to(device)[:, None]
            # back from the unbiased variance; a count of 1 never gets past the layer's forward
            self.moments.merge(Moments(count, mean, var * (count - 1)[..., None]))
        self._counts = []

    def _before(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        if not layer.training:
            return
        if len(self._counts) == _BLOCK:
            self._take_block()
            self._new_block()
        row = len(self._counts)
        layer._buffers["running_mean"] = self._scratch[0, row]
        layer._buffers["running_var"] = self._scratch[1, row]

    def _after(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        layer._buffers.update(self._own)
        if layer.training:
            x = args[0] if args else kwargs["input"]
            # of a count of 0, merging ignores the mean and variance, whatever they are
            self._counts.append(x.numel() // x.shape[1])


class _InputLayer(TorchLayer):
    """A layer with a forward of its own (nn.SyncBatchNorm, detectron2's NaiveSyncBatchNorm, other
    subclasses) or with half-precision buffers: the moments of its input are computed once more.

    What such a layer leaves in its buffers may be pooled over ranks, biased, or rounded.
    """

    @contextmanager
    def observing(self) -> Iterator[None]:
        own = dict(self.layer._buffers)
        handle = self.layer.register_forward_pre_hook(self._before, with_kwargs=True)
        try:
            for name, buffer in own.items():
                self.layer._buffers[name] = None if buffer is None else buffer.clone()
            yield
        finally:
            handle.remove()
            self.layer._buffers.update(own)

    def _before(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["input"]
        if layer.training:
            self.moments.add(Moments(*(value[None] for value in local_moments(x))))


class ThawedLayer(TorchLayer):
    """A FrozenBatchNorm2d, whose constant statistics are estimated all the same.

    Meanwhile it normalises by its mini-batch, as the BN that it once was in training.

    Raises:
        ValueError: when its statistics are folded into weight and bias (mean 0, variance 1): any
            estimate would be put on top of them.
    """

    def __init__(self, name: str, layer: Any) -> None:
        mean, var = layer.running_mean, layer.running_var
        if not mean.any() and ((var - 1).abs() <= 2 * layer.eps).all():
            raise ValueError(
                f"{name}: its mean is 0 and its variance 1, so the statistics of these weights are "
                "folded into weight and bias and cannot be replaced by estimates"
            )
        super().__init__(name, layer)

    @contextmanager
    def observing(self) -> Iterator[None]:
        attributes = vars(self.layer)
        before = {"forward": attributes["forward"]} if "forward" in attributes else {}
        attributes["forward"] = self._forward
        try:
            yield
        finally:
            del attributes["forward"]
            attributes.update(before)

    def _forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        outputs, local = normalize(
            [x], [layer.weight], [layer.bias], parts=[0], pools=[0], eps=layer.eps, report=True
        )
        assert local is not None  # for the type checker
        self.moments.add(local)
        return outputs[0]


def named_frozen_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers that are a BN with constant statistics by their class, with their names.

    detectron2's FrozenBatchNorm2d and torchvision's, found by their name and buffers.
    """
    return [
        (name, module)
        for name, module in model.named_modules()
        if any(kind.__name__ == "FrozenBatchNorm2d" for kind in type(module).__mro__)
        and {"running_mean", "running_var"} <= module._buffers.keys()
    ]


def _observed(name: str, layer: nn.Module) -> ObservedLayer:
    if isinstance(layer, PopulationLayer):
        return ObservedLayer(name, layer)
    assert isinstance(layer, _BatchNorm)
    assert layer.running_mean is not None  # for the type checker, see is_population_layer
    if is_lazy(layer.running_mean):
        raise ValueError(f"{name}: a lazy layer; run one forward first, so that it has a size")
    return (TorchLayer if leaves_moments(layer) else _InputLayer)(name, layer)


def leaves_moments(layer: nn.Module) -> bool:
    """Return whether a training forward leaves its input's moments in the layer's buffers."""
    if not isinstance(layer, _BatchNorm) or layer.running_mean is None:
        return False
    exact = layer.running_mean.dtype in (torch.float32, torch.float64)
    return exact and type(layer).forward is _BatchNorm.forward and layer.track_running_stats


def is_population_layer(module: nn.Module) -> bool:
    """Return whether inference with ``module`` uses population statistics kept in buffers.

    True for the package's own layers, nn.BatchNorm1d/2d/3d, nn.SyncBatchNorm and subclasses, but
    not with ``track_running_stats=False``, nor for detectron2's FrozenBatchNorm2d.
    """
    if isinstance(module, _BatchNorm):
        kept = module.running_mean is not None and module.running_var is not None
        return kept and module.track_running_stats
    return isinstance(module, PopulationLayer)


def named_population_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return every BN-like layer once, under its first name; the model itself has the name "".

    Modules inside one of the package's layers belong to it.
    """
    inside: set[nn.Module] = set()
    found = []
    for name, module in model.named_modules():
        if module in inside or not is_population_layer(module):
            continue
        if isinstance(module, PopulationLayer):
            inside.update(child for _, child in model.get_submodule(name).named_modules())
        found.append((name, module))
    return found


def find_population_layers(model: nn.Module) -> tuple[list[tuple[str, nn.Module]], list[str]]:
    """Return the BN-like layers in training mode, and the names of those in eval mode."""
    found = named_population_layers(model)
    frozen = [name for name, layer in found if not layer.training]
    return [(name, layer) for name, layer in found if layer.training], frozen


def observe(layers: list[tuple[str, nn.Module]]) -> list[ObservedLayer]:
    """Prepare layers for observation; nothing about them changes until ``observing`` is entered.

    Raises:
        ValueError: for a layer that has no size yet.
    """
    return [_observed(name, layer) for name, layer in layers]
