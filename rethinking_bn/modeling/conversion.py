"""Change the norm of modules that are already built; for MABN, centre their convolutions too."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.layers.batch_norm import LayerNorm
from torch import nn
from torchvision.models.convnext import LayerNorm2d

from rethinking_bn.checkpoint import mabn_without_statistics
from rethinking_bn.layers import CenConv2d, MABN2d, get_norm

logger = logging.getLogger(__name__)

# What is called norm in detectron2's models. Layers that know levels (MultiDomainBatchNorm2d,
# CycleBatchNormList) cannot be replaced by one that does not, and stay.
_NORMS = (
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    FrozenBatchNorm2d,
    nn.GroupNorm,
    LayerNorm,
    LayerNorm2d,
    MABN2d,
)
_PLAIN_CONVOLUTIONS = (nn.Conv2d, Conv2d, CenConv2d)


def convert_norms(
    module: nn.Module, norm: str | Callable[..., nn.Module | None], **options: Any
) -> nn.Module:
    """Replace every norm layer of a module by another kind, in place.

    Scale and shift are carried over (a build's initial values), statistics are not: they start
    anew. For "MABN" the convolutions before the norms become CenConv2d, as
    :func:`centre_convolutions` says. Convolutions without a norm stay as they are, and every
    convolution's weight stays the same parameter under the same name.

    Args:
        module: a backbone, an FPN, a head. Norms found are BatchNorm2d and its kin, FrozenBN, GN,
            LN and MABN; not those that tell feature levels apart.
        norm: a name that :func:`rethinking_bn.layers.get_norm` knows, or a callable.
        options: of the norm layers.

    Returns:
        the module, or its replacement when it is itself a norm or a convolution.

    Raises:
        ValueError: for an unknown or empty name, channels that the norm cannot have, or a
            convolution that cannot be centred; the module is as it was then.
    """
    replaced: dict[int, nn.Module] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, _NORMS):
            replaced[id(layer)] = _in_place_of(layer, name, norm, options)
    if any(isinstance(layer, MABN2d) for layer in replaced.values()):
        replaced.update(_centred(module, replaced))
    return _finish(module, replaced)


def centre_convolutions(module: nn.Module) -> nn.Module:
    """Replace, in place, the convolution before every MABN2d by a CenConv2d without bias.

    The convolution of a norm is the one that has it as its ``norm`` (detectron2's Conv2d), or
    else the child right before it in the same parent (``nn.Sequential(conv, norm, ...)``).
    A weight that is loaded later without its mean square is warned of; see
    :func:`warn_of_missing_statistics`.

    Args:
        module: with :class:`~rethinking_bn.layers.MABN2d` layers.

    Returns:
        the module, or its replacement when it is itself a convolution.

    Raises:
        ValueError: naming the layer, where there is no plain convolution; nothing has changed.
    """
    return _finish(module, _centred(module, {}))


def _in_place_of(
    old: nn.Module,
    name: str,
    norm: str | Callable[..., nn.Module | None],
    options: Mapping[str, Any],
) -> nn.Module:
    """Return a new norm layer with the channels, affine, place and mode of an old one."""
    try:
        new = get_norm(norm, _channels(old), **options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}" if name else str(error)) from error
    if new is None:
        raise ValueError("norm must name a norm layer: there is nothing to convert to")
    tensor = next(chain(old.parameters(), old.buffers()), None)
    if tensor is not None:
        new.to(tensor.device, tensor.dtype)
    for affine in ("weight", "bias"):
        source, target = getattr(old, affine, None), getattr(new, affine, None)
        if source is None or target is None:
            continue
        with torch.no_grad():
            target.copy_(source)
        if isinstance(source, nn.Parameter):
            target.requires_grad_(source.requires_grad)
    return new.train(old.training)


def _channels(norm: Any) -> int:
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    if isinstance(norm, (LayerNorm, LayerNorm2d)):
        return norm.normalized_shape[0]
    return norm.num_features


def _centred(module: nn.Module, replaced: Mapping[int, nn.Module]) -> dict[int, nn.Module]:
    """Return id of convolution -> its CenConv2d, for the norms that are or become MABN2d."""
    centred: dict[int, nn.Module] = {}
    for name, parent, place in _places(module):
        norm = parent.get_submodule(place)
        if isinstance(replaced.get(id(norm), norm), MABN2d):
            convolution = _convolution_of(name, parent, place, norm)
            if not isinstance(convolution, CenConv2d):
                centred[id(convolution)] = _centre(name, convolution)
    return centred


def _places(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield full name, parent and name in the parent of every norm below a module."""
    for prefix, parent in module.named_modules():
        for place, child in parent.named_children():
            if isinstance(child, _NORMS):
                yield (f"{prefix}.{place}" if prefix else place), parent, place


def _convolution_of(name: str, parent: nn.Module, place: str, norm: nn.Module) -> nn.Conv2d:
    found: nn.Module | None = parent
    if place != "norm":
        children = dict(parent.named_children())
        before = list(children)[: list(children).index(place)]
        found = children[before[-1]] if before else None
        if found is not None and getattr(found, "norm", None) is not None:
            found = None  # it has a norm of its own
    if type(found) not in _PLAIN_CONVOLUTIONS or not isinstance(found, nn.Conv2d):
        what = "nothing" if found is None else type(found).__name__
        raise ValueError(
            f"{name}: MABN needs a plain convolution before it, whose filters can be centred, "
            f"but there is {what}"
        )
    if found.out_channels != _channels(norm):
        raise ValueError(
            f"{name} has {_channels(norm)} channels, but the convolution before it has "
            f"{found.out_channels}"
        )
    return found


def _centre(name: str, old: nn.Conv2d) -> CenConv2d:
    try:
        new = CenConv2d(
            old.in_channels,
            old.out_channels,
            old.kernel_size,  # type: ignore[arg-type]
            stride=old.stride,
            padding=old.padding,
            dilation=old.dilation,
            groups=old.groups,
            bias=False,
            padding_mode=old.padding_mode,
            norm=getattr(old, "norm", None),
            activation=getattr(old, "activation", None),
            device="meta",  # the weight is the old one: nothing is drawn
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    new.weight = old.weight
    return new.train(old.training)


def _finish(module: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module:
    module = _substitute(module, replaced)
    if any(isinstance(layer, MABN2d) for layer in module.modules()):
        warn_of_missing_statistics(module)
    return module


def _substitute(module: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module:
    """Put the new modules where the old ones are registered or kept in a list or tuple."""
    module = replaced.get(id(module), module)
    for name, child in module.named_children():
        new = _substitute(child, replaced)
        if new is not child:
            module.add_module(name, new)
    for name, value in list(vars(module).items()):
        # detectron2's FPN and heads also call layers from lists that are no ModuleList
        if type(value) in (list, tuple) and any(id(item) in replaced for item in value):
            setattr(module, name, type(value)(replaced.get(id(item), item) for item in value))
    return module


def warn_of_missing_statistics(module: nn.Module) -> None:
    """Make a module warn, in one line, when it loads weights without their MABN statistics.

    Weights that were trained with another norm, or whose norm was fused, load without an error
    under detectron2's checkpointer and then evaluate by R = 1.
    """
    hooks = module._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", None) is _check_statistics for hook in hooks):
        module._register_load_state_dict_pre_hook(_check_statistics, with_module=True)


def _check_statistics(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    missing = mabn_without_statistics(module, state_dict, prefix)
    if missing:
        logger.warning(
            "%d MABN layers get weights without running_mean_square (%s, ...), so these were not "
            "trained with MABN: load MABN weights, or train or re-estimate the statistics "
            "(TEST.PRECISE_BN.ENABLED True) before evaluating, else AP will be far too low",
            len(missing),
            missing[0],
        )
