"""Freezing a BN-like layer: population statistics from now on, whatever ``train()`` says.

``eval()`` lasts until somebody calls ``train()`` on the model, as detectron2's evaluation does at
its end. A frozen layer is in eval mode because its class says so, a subclass of the one it had,
made on the fly. A copy, a pickle or a scripted module of it is as frozen.
"""

# no "from __future__ import annotations": TorchScript reads _never's as it is
from functools import cache
from typing import Any

from torch import nn


def _never(self: Any) -> bool:
    return False


class _EvalMode(property):
    """A ``training`` that is False, in TorchScript, too, and only remembers what it is set to."""

    def __set__(self, layer: Any, mode: bool) -> None:
        layer._asked_training = mode


class FrozenStatistics:
    """What the class of a frozen layer has before the one it had."""

    training = _EvalMode(_never)
    frozen = True
    # no Any: TorchScript of torch 2.4 takes that for Final on Python 3.10
    _class: type[nn.Module]  # the one it had
    _asked_training: bool
    _affine_required_grad: dict[str, bool] | None

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is found by the one it was made of, in copies and in pickles
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return (_new_frozen, (self._class,), *reduced[2:])


@cache
def _frozen_class(cls: Any) -> Any:
    # of torch's layers the module stays torch's: torch.fx takes those whole
    members = {"_class": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(f"StatisticsFrozen{cls.__name__}", (FrozenStatistics, cls), members)


def _new_frozen(cls: Any) -> Any:
    frozen = _frozen_class(cls)
    return frozen.__new__(frozen)


def is_frozen(layer: nn.Module) -> bool:
    """Return whether :func:`freeze_layer` froze the layer."""
    return isinstance(layer, FrozenStatistics)


def freeze_layer(layer: nn.Module, *, affine: bool = False) -> None:
    """Keep a layer in eval mode until :func:`thaw_layer`; freezing it again does no harm.

    Args:
        affine: freeze its parameters as well (``requires_grad`` False).
    """
    if not isinstance(layer, FrozenStatistics):
        mode = vars(layer).pop("training")
        cls: Any = type(layer)
        layer.__class__ = _frozen_class(cls)
        vars(layer).update(_asked_training=mode, _affine_required_grad=None)
    if affine and layer._affine_required_grad is None:
        layer._affine_required_grad = {n: p.requires_grad for n, p in layer.named_parameters()}
        layer.requires_grad_(False)


def thaw_layer(layer: nn.Module) -> None:
    """Undo :func:`freeze_layer`: the layer is in the mode last asked for, its affine as it was."""
    if not isinstance(layer, FrozenStatistics):
        return
    assert isinstance(layer, nn.Module)  # for the type checker
    before = vars(layer).pop("_affine_required_grad") or {}
    mode = vars(layer).pop("_asked_training")
    layer.__class__ = layer._class  # type: ignore[assignment]
    layer.training = mode
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(before.get(name, parameter.requires_grad))
