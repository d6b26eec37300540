"""Another BatchNorm below a subclass: what a norm and activation is converted to."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from rethinking_bn.layers.batch_norm import BatchNorm2d
from rethinking_bn.layers.bn_like import bare_copy
from rethinking_bn.numerics.moments import Moments


class _Rebased:
    """What the class of a rebased layer has before the two that it is made of."""

    _made_of: tuple[type, type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is found by the two it is made of, in copies and in pickles
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return (_new_rebased, self._made_of, *reduced[2:])


@cache
def _rebased_class(subclass: Any, base: Any) -> Any:
    members = {"_made_of": (subclass, base), "__module__": subclass.__module__}
    return type(f"{subclass.__name__}On{base.__name__}", (_Rebased, subclass, base), members)


def _new_rebased(subclass: Any, base: Any) -> Any:
    cls = _rebased_class(subclass, base)
    return cls.__new__(cls)


def rebase(old: nn.Module, new: nn.Module) -> nn.Module | None:
    """Let a subclass of nn.BatchNorm2d run another BatchNorm where it runs its parent's forward.

    The result has the tensors of ``new`` and all other attributes of ``old``, its modules too; the
    state dict has the same keys. That it computes what ``old`` computes, by the forward of ``new``,
    is tried on copies.

    Args:
        old: of a class with a forward of its own.
        new: one of this package's, with the tensors of ``old``; it is changed.

    Returns:
        None where the subclass does not run its parent's forward, or is none of nn.BatchNorm2d.
    """
    if not isinstance(old, nn.BatchNorm2d) or not isinstance(new, BatchNorm2d):
        return None
    before: Any = type(new)
    classes: Any = _rebased_class
    try:
        new.__class__ = classes(type(old), before)
    except TypeError:  # no order of the classes' parents
        return None
    for name, value in vars(old).items():
        vars(new).setdefault(name, value)
    for name, module in old._modules.items():
        new._modules.setdefault(name, module)
    if not _computes_the_same(old, new):
        new.__class__ = before
        return None
    return new


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
        return bool(seen) and all(torch.allclose(a, b) for a, b in alike)
    except Exception:  # whatever a foreign forward raises for such an input
        return False
