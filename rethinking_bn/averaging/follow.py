"""Keep a copy of a model up with what the model holds beside its parameters."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from rethinking_bn.layers import PopulationLayer
from rethinking_bn.layers.frozen import freeze_layer, is_frozen, thaw_layer

_PLAIN = (bool, int, float, type(None))


def follow(copy: nn.Module, model: nn.Module, *, averaged: Container[str]) -> None:
    """Bring modes and buffers of ``copy`` to those of ``model``.

    Frozen layers are frozen in the copy, too. With the buffers of BN-like layers go their plain
    attributes, numbers and truth values, such as how many values a ring buffer of MABN holds.

    Args:
        copy: once a deep copy of ``model``.
        averaged: names of buffers to leave alone.

    Raises:
        ValueError: when the model is built of other modules now.
    """
    theirs = dict(model.named_buffers())
    mine = dict(copy.named_buffers())
    pairs = list(zip(model.modules(), copy.modules(), strict=False))
    for source, target in pairs:
        if is_frozen(source):
            freeze_layer(target)
        elif is_frozen(target):
            thaw_layer(target)
            target.requires_grad_(False)  # what unfreezing gives back is the trained layer's
    if any(type(source) is not type(target) for source, target in pairs):
        raise ValueError("the model's modules are not those it had; begin anew with restart()")
    for source, target in pairs:
        target.training = source.training
        if isinstance(source, (PopulationLayer, _NormBase)):
            for part, own in zip(source.modules(), target.modules(), strict=True):
                plain = {n: v for n, v in vars(part).items() if type(v) in _PLAIN}
                vars(own).update(plain)
    if {n: b.shape for n, b in mine.items()} != {n: b.shape for n, b in theirs.items()}:
        _adopt(copy, model)
        mine = dict(copy.named_buffers())
    copy_buffers({name: buffer for name, buffer in mine.items() if name not in averaged}, theirs)


def copy_buffers(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    """Copy the buffers that both have in the same shape, in place."""
    names = [n for n, t in targets.items() if n in sources and sources[n].shape == t.shape]
    if names:
        torch._foreach_copy_([targets[n] for n in names], [sources[n].detach() for n in names])


def _adopt(copy: nn.Module, model: nn.Module) -> None:
    """Register the buffers that ``model`` got or dropped since the copy was made."""
    for source, target in zip(model.modules(), copy.modules(), strict=True):
        for name, buffer in source._buffers.items():
            own = target._buffers.get(name)
            if buffer is None or own is None or own.shape != buffer.shape:
                target._buffers[name] = None if buffer is None else buffer.detach().clone()
        for name in target._buffers.keys() - source._buffers.keys():
            del target._buffers[name]
        target._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
