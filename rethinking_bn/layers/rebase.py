"""Another BatchNorm in a subclass that does more: what a norm and activation is converted to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from rethinking_bn.layers.batch_norm import BatchNorm2d
from rethinking_bn.layers.bn_like import bare_copy
from rethinking_bn.numerics.moments import Moments


class _Rebased:
    """What the class of a rebased layer has before the two that it is made of."""

    _made_of: tuple[Any, Any, bool]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is found by what it is made of, in copies and in pickles
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return (_new_rebased, self._made_of, *reduced[2:])


def _norm_then_rest(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    subclass, base, _ = self._made_of
    x = base.forward(self, x)
    with _identity(self):
        return subclass.forward(self, x, *args, **kwargs)


@contextmanager
def _identity(layer: Any) -> Iterator[None]:
    """Let a BatchNorm in eval mode return its input."""
    buffers, parameters, training = dict(layer._buffers), dict(layer._parameters), layer.training
    layer._buffers["running_mean"] = torch.zeros_like(layer.running_mean)
    layer._buffers["running_var"] = torch.full_like(layer.running_var, 1 - layer.eps)
    layer._parameters.update(weight=None, bias=None)
    try:
        if training:
            layer.training = False
        yield
    finally:
        layer._buffers.update(buffers)
        layer._parameters.update(parameters)
        if training:
            layer.training = True


@cache
def _rebased_class(subclass: Any, base: Any, calls_parent: bool) -> Any:
    members = {"_made_of": (subclass, base, calls_parent), "__module__": subclass.__module__}
    if not calls_parent:
        members["forward"] = _norm_then_rest
    return type(f"{subclass.__name__}On{base.__name__}", (_Rebased, subclass, base), members)


def _new_rebased(subclass: Any, base: Any, calls_parent: bool) -> Any:
    cls = _rebased_class(subclass, base, calls_parent)
    return cls.__new__(cls)


def rebase(old: nn.Module, new: nn.Module) -> nn.Module | None:
    """Let a subclass of nn.BatchNorm2d normalise by another BatchNorm and do the rest as it does.

    The result is ``new``, changed: it keeps its tensors and gets all other attributes of ``old``,
    its modules too. It runs the forward of the class of ``old``, whose parent is now the class of
    ``new``; a forward that does not call its parent's runs behind the new one, with a norm that is
    the identity. Copies show whether this computes what ``old`` does; None where it does not.
    """
    if not isinstance(old, nn.BatchNorm2d) or not isinstance(new, BatchNorm2d):
        return None
    kinds: Any = type(old), type(new)
    for name, value in vars(old).items():
        vars(new).setdefault(name, value)
    for name, module in old._modules.items():
        new._modules.setdefault(name, module)
    for calls_parent in (True, False):
        try:
            new.__class__ = _rebased_class(*kinds, calls_parent)
        except TypeError:  # no order of the classes' parents
            return None
        if _computes_the_same(old, new):
            return new
    return None


@torch.no_grad()
def _computes_the_same(old: nn.Module, new: Any) -> bool:
    seen: list[Moments] = []
    try:
        one, other = bare_copy(old), bare_copy(new)
        other.sync = False
        t = torch.arange(8 * one.num_features, dtype=torch.float64, device="cpu")
        x = 3 * (t.square() % 17.3).sin().view(4, -1, 2, 1)  # any values that differ
        with torch.random.fork_rng(devices=[]):
            for training in (True,) if new.batch_stats_at_inference else (False, True):
                one.train(training), other.train(training)
                if not torch.allclose(one(x.clone()), other(x.clone())):
                    return False
            with other.observing(seen.append):
                other(x.clone())
        alike = zip(one.buffers(), other.buffers(), strict=True)
        # whether batches are counted matters to nobody
        return len(seen) == 1 and all(torch.allclose(a, b) for a, b in alike if a.dim())
    except Exception:  # whatever a foreign forward raises for such an input
        return False
