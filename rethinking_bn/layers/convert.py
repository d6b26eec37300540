"""Another norm in a model that is already built, and the convolutions before MABN; torch only."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d

from rethinking_bn.layers.batch_norm import BatchNorm2d, SyncBatchNorm2d
from rethinking_bn.layers.bn_like import BatchNormLike, find_bn_like, runs_foreign_forward
from rethinking_bn.layers.centring import (
    centred_convolutions,
    norm_channels,
    warn_of_missing_statistics,
)
from rethinking_bn.layers.frozen import freeze_layer, is_frozen
from rethinking_bn.layers.mabn import MABN2d
from rethinking_bn.layers.multi_domain import DomainBatchNormBase
from rethinking_bn.layers.norms import get_norm, norm_names
from rethinking_bn.layers.rebase import rebase

logger = logging.getLogger(__name__)

Norm = str | Callable[..., nn.Module | None]
Replace = Mapping[type, Callable[[Any, Any], nn.Module]]  # class -> (old layer, new norm) -> module

# Kinds of BN: what is no BN stays as it is.
_BN_ONLY = ("SyncBN", "FrozenBN")
_SAYS = (
    "{name}: {kind} has a forward of its own, which may do more than normalise; say what becomes "
    "of it: replace={{{kind}: lambda layer, new: ...}} returns the module to put in its place (new "
    "alone, or with what else the layer does)"
)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "running_mean_square")


def convert_norms(
    model: nn.Module, norm: Norm, *, replace: Replace | None = None, **options: Any
) -> nn.Module:
    """Replace every norm layer of a model by another kind, in place.

    ``convert_norms(torchvision.models.resnet50(), "MABN", batch_size=2)``. Stands for
    ``nn.SyncBatchNorm.convert_sync_batchnorm`` and ``FrozenBatchNorm2d.convert_frozen_batchnorm``
    too, which do not know this package's layers.

    Replaced are nn.BatchNorm2d and its kin, nn.SyncBatchNorm, FrozenBatchNorm2d of any project
    (see :func:`rethinking_bn.layers.bn_like.find_bn_like`), and all of ours; GN, LN and IN layers
    as well, except by "SyncBN" and "FrozenBN". Parameters stay the same objects of the same names
    ("FrozenBN" has copies). Carried over are the statistics that both kinds have (with eps,
    momentum and ``rows_at_a_time``, among kinds of BN), mode, device and type. The log says how
    many layers' statistics start anew or lose ``rows_at_a_time``, and a warning names
    BN-like layers that stay: BatchNorm1d and 3d, and what is not known to be BatchNorm.

    - A layer that does more than its norm (a norm with its activation) goes on doing it: "FrozenBN"
      freezes it in place, "BN", "SyncBN" and "BatchStatBN" normalise by theirs, if a trial shows
      that it computes the same. If not (a split BatchNorm), it stays where it is of that kind
      anyway, and else is an error, unless ``replace`` says what becomes of it, such as
      ``replace={NormAct: lambda layer, new: nn.Sequential(new, layer.act)}``.
    - "MABN": the convolution before each norm becomes a CenConv2d (same parameter, same name; a
      bias is dropped) and stays one when its MABN2d is replaced. As features are others behind
      centred filters, MABN's statistics start anew: train, or estimate them.
    - "FrozenBN" is torchvision's layer, without trainable parameters.
    - Layers with several domains stay what they are: "FrozenBN" freezes them in place, "BN" and
      "SyncBN" say whether they pool over ranks, and others leave them alone and say so. "FrozenBN"
      freezes MABN2d in place, too.

    Args:
        model: a network, a part of one, or a norm layer.
        norm: a name that :func:`rethinking_bn.layers.get_norm` knows, or a callable.
        replace: class -> function of a layer of that class (or a subclass) and of the new norm
            with its affine and statistics, which returns the module to put in its place.
        options: keyword arguments of the norm layers.

    Returns:
        the model, or its replacement when it is itself a norm or a convolution.

    Raises:
        ValueError: for an unknown or empty name, channels that the norm cannot have, a layer that
            does more than its norm or whose tensors are parametrized, one without statistics to
            freeze, or a convolution that cannot be centred; the model is as it was then.
    """
    model, replaced, left = replace_norms(model, norm, replace=replace, **options)
    if left:
        logger.warning("%s replaces no layer of their kind: %s stay", norm, ", ".join(left))
    replaced = {
        old: new for old, new in replaced.items() if not replace or type(old) not in replace
    }
    anew = sum(not _statistics_carry(old, new) for old, new in replaced.items())
    if anew:
        logger.info("%d of %d %s layers start with new statistics", anew, len(replaced), norm)
    apart = [[getattr(m, "rows_at_a_time", 0) > 0 for m in pair] for pair in replaced.items()]
    together = apart.count([True, False])
    if together:
        logger.info("%d %s layers normalise all rows together now", together, norm)
    return model


def replace_norms(
    model: nn.Module, norm: Norm, *, replace: Replace | None = None, **options: Any
) -> tuple[nn.Module, dict[nn.Module, nn.Module], list[str]]:
    """Do what :func:`convert_norms` does without logging it, for code that builds a model.

    Returns:
        the model, old norm layer -> new one, and the names of the layers that were left alone.
    """
    if not callable(norm) and norm not in norm_names():
        raise ValueError(f"norm must be one of {norm_names()} or a callable, got {norm!r}")
    found = find_bn_like(model, lazy=True)
    alike = {layer.module: layer for layer in found.layers}
    unknown = {entry.module: entry.reason for entry in found.left}
    replaced: dict[nn.Module, nn.Module] = {}
    kept: list[Any] = []  # they know domains, or are frozen in place
    left: list[str] = []
    for name, layer in model.named_modules():
        like, kind = alike.get(layer), type(layer).__name__
        does_more = like is not None and like.kind == "own" and not like.is_batch_norm_2d
        freezes = norm == "FrozenBN" and (isinstance(layer, MABN2d) or does_more)
        functions = [replace[cls] for cls in type(layer).__mro__ if replace and cls in replace]
        if functions:
            replaced[layer] = functions[0](layer, _in_place_of(layer, name, norm, options, like))
        elif isinstance(layer, DomainBatchNormBase) or freezes:
            kept.append(layer)
            if norm not in ("BN", *_BN_ONLY):
                left.append(name)
        elif layer in unknown or isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm3d)):
            why = None if isinstance(layer, LazyModuleMixin) else unknown.get(layer)
            left.append(f"{name} ({kind}: {why})" if why else name)
        elif _is_replaced(layer, norm, like):
            if parametrize.is_parametrized(layer):
                raise ValueError(
                    f"{name}: tensors of this {kind} are parametrized, which would be lost: call "
                    "torch.nn.utils.parametrize.remove_parametrizations before"
                )
            new = _in_place_of(layer, name, norm, options, like)
            if runs_foreign_forward(layer) and not (like is not None and like.is_batch_norm_2d):
                below = rebase(layer, new)
                if below is None:
                    if like is None or norm != ("SyncBN" if like.pools_ranks else "BN"):
                        raise ValueError(_SAYS.format(name=name, kind=kind))
                    left.append(f"{name} ({kind}: a forward of its own)")
                    continue
                new = below
            replaced[layer] = new
        elif like is not None:  # InstanceNorm that keeps statistics
            left.append(name)
    becomes_mabn = any(isinstance(layer, MABN2d) for layer in replaced.values())
    centred = centred_convolutions(model, replaced) if becomes_mabn else {}
    # from here on nothing can fail
    model = _substitute(model, {**replaced, **centred})
    for layer in kept:
        if norm == "FrozenBN":
            freeze_layer(layer, affine=True)
        elif norm in ("BN", "SyncBN"):
            layer.sync = norm == "SyncBN"
            for option in {"process_group", "eps", "momentum"}.intersection(options):
                setattr(layer, option, options[option])
    return model, replaced, left


def _is_replaced(layer: nn.Module, norm: Norm, like: BatchNormLike | None) -> bool:
    """Return whether a norm takes the place of a layer, all other things allowing it."""
    if isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm, MABN2d)):
        return True
    # a model can only hold detectron2's layers where they were imported
    theirs = getattr(sys.modules.get("detectron2.layers.batch_norm"), "LayerNorm", LayerNorm2d)
    if isinstance(layer, (nn.GroupNorm, nn.InstanceNorm2d, LayerNorm2d, theirs)):
        return norm not in _BN_ONLY
    return like is not None


def centre_convolutions(module: nn.Module) -> nn.Module:
    """Replace, in place, the convolution before every MABN2d by a CenConv2d without bias.

    A weight that is loaded later without its mean square is warned of.

    Returns:
        the module, or its replacement when it is itself a convolution.

    Raises:
        ValueError: naming the layer, where there is no plain convolution; nothing has changed.
    """
    return _substitute(module, centred_convolutions(module, {}))


def _in_place_of(
    old: Any, name: str, norm: Norm, options: Mapping[str, Any], alike: BatchNormLike | None
) -> nn.Module:
    """Return a new norm layer with the channels, affine, place and mode of an old one."""
    try:
        new: Any = get_norm(norm, norm_channels(old), **_options(old, norm, options, alike))
        if new is None:
            raise ValueError("norm must name a norm layer: there is nothing to convert to")
        if isinstance(new, FrozenBatchNorm2d) and getattr(old, "running_mean", None) is None:
            raise ValueError(f"{type(old).__name__} has no statistics to freeze")
    except ValueError as error:
        raise ValueError(f"{name}: {error}" if name else str(error)) from error
    for tensor in chain(old.parameters(), old.buffers()):
        if tensor.is_floating_point():
            new.to(tensor.device, tensor.dtype)
            break
    for buffer in _STATISTICS if _statistics_carry(old, new) else ():
        value = getattr(old, buffer, None)
        if value is not None and getattr(new, buffer, None) is not None:
            getattr(new, buffer).copy_(value)
    for affine in ("weight", "bias"):
        source, target = getattr(old, affine, None), getattr(new, affine, None)
        if source is None or target is None:
            continue
        if isinstance(source, nn.Parameter) and isinstance(target, nn.Parameter):
            setattr(new, affine, source)  # optimizers and other layers may hold it
        else:
            target.data.copy_(source.data)
    if isinstance(new, BatchNorm2d) and not new.sync:
        new.rows_at_a_time = getattr(old, "rows_at_a_time", 0)
    if alike is not None and hasattr(new, "track_running_stats"):
        new.track_running_stats = getattr(old, "track_running_stats", True)
    new.train(old.training)
    if is_frozen(old) and not isinstance(new, FrozenBatchNorm2d):
        freeze_layer(new)
        for asked in ("_asked_training", "_affine_required_grad"):  # what unfreezing gives back
            if asked in vars(old):
                vars(new)[asked] = vars(old)[asked]
    return new


def _options(
    old: Any, norm: Norm, options: Mapping[str, Any], alike: BatchNormLike | None
) -> dict[str, Any]:
    """Return what the old layer says about the new one, overridden by the options."""
    inherited: dict[str, Any] = {}
    if norm in ("BN", "SyncBN", "BatchStatBN", "FrozenBN"):
        if alike is not None and not alike.mean_square:  # the same variance needs the same eps
            inherited["eps"] = alike.eps
        if isinstance(old, (nn.BatchNorm2d, nn.SyncBatchNorm)) and norm != "FrozenBN":
            inherited["momentum"] = old.momentum
            inherited["track_running_stats"] = alike is not None and alike.keeps_statistics
        if norm == "SyncBN" and isinstance(old, (nn.SyncBatchNorm, SyncBatchNorm2d)):
            inherited["process_group"] = old.process_group
    if getattr(old, "weight", None) is None and norm != "FrozenBN" and not callable(norm):
        inherited["elementwise_affine" if norm == "LN" else "affine"] = False
    return {**inherited, **options}


def _statistics_carry(old: nn.Module, new: nn.Module) -> bool:
    """Return whether the new layer needs no statistics, or has those of the old one."""
    for needed in ("running_var", "running_mean_square"):
        if getattr(new, needed, None) is not None and getattr(old, needed, None) is None:
            return False
    return True


def _substitute(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put the new modules where the old ones are registered or kept in a list or tuple."""
    model = replaced.get(model, model)
    new = chain.from_iterable(module.modules() for module in replaced.values())
    for module in {*model.modules(), *new}.difference(replaced):
        for name, child in module._modules.items():
            if child is not None and child in replaced:
                module._modules[name] = replaced[child]
        for name, value in list(vars(module).items()):
            # detectron2's FPN and heads also call layers from lists that are no ModuleList
            if type(value) in (list, tuple):
                items = [replaced.get(v, v) if isinstance(v, nn.Module) else v for v in value]
                if any(one is not other for one, other in zip(items, value, strict=True)):
                    setattr(module, name, type(value)(items))
    if any(isinstance(layer, MABN2d) for layer in model.modules()):
        warn_of_missing_statistics(model)
    return model
