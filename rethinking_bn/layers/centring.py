"""MABN's other half in a built model: its convolutions centred, weights without it noticed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from rethinking_bn.layers.mabn import CenConv2d, MABN2d
from rethinking_bn.layers.ring import is_official

logger = logging.getLogger(__name__)

_KEPT = ("stride", "padding", "dilation", "groups", "padding_mode")


def centred_convolutions(
    module: nn.Module, replaced: Mapping[nn.Module, nn.Module]
) -> dict[nn.Module, nn.Module]:
    """Return convolution -> its CenConv2d, for the norms that are or become MABN2d.

    The convolution of a norm is the one that has it as its ``norm`` (detectron2's Conv2d), or
    else the child right before it in the same parent. Nothing is changed here. A ValueError names
    the norm that has no plain convolution of its channels before it.

    Args:
        replaced: old norm -> new norm, of those about to be replaced.
    """
    centred: dict[nn.Module, nn.Module] = {}
    for name, parent, place in _places(module, replaced):
        convolution = _convolution_of(name, parent, place)
        if not isinstance(convolution, CenConv2d):
            centred[convolution] = _centre(name, convolution)
    return centred


def _places(
    module: nn.Module, replaced: Mapping[nn.Module, nn.Module]
) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield full name, parent and name in the parent of every norm that is or becomes MABN2d."""
    for prefix, parent in module.named_modules():
        for place, child in parent._modules.items():
            if child is not None and isinstance(replaced.get(child, child), MABN2d):
                yield (f"{prefix}.{place}" if prefix else place), parent, place


def _convolution_of(name: str, parent: nn.Module, place: str) -> nn.Conv2d:
    found: nn.Module | None = parent
    if place != "norm":
        children = parent._modules
        before = list(children)[: list(children).index(place)]
        found = children[before[-1]] if before else None
        if found is not None and getattr(found, "norm", None) is not None:
            found = None  # it has a norm of its own
    if type(found) not in _plain_convolutions() or not isinstance(found, nn.Conv2d):
        what = "nothing" if found is None else type(found).__name__
        raise ValueError(
            f"{name}: MABN needs a plain convolution before it, whose filters can be centred, "
            f"but there is {what}"
        )
    channels = norm_channels(parent._modules[place])
    if found.out_channels != channels:
        raise ValueError(
            f"{name} has {channels} channels, but the convolution before it has "
            f"{found.out_channels}"
        )
    return found


def norm_channels(norm: Any) -> int:
    """Return the number of channels of a norm layer of torch, torchvision, detectron2 or ours."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    if hasattr(norm, "num_features"):
        return norm.num_features
    if hasattr(norm, "normalized_shape"):
        return norm.normalized_shape[0]
    return len(norm.running_mean)  # torchvision's FrozenBatchNorm2d


def _plain_convolutions() -> tuple[type, ...]:
    # a model can only hold detectron2's layers where they were imported
    wrapper = getattr(sys.modules.get("detectron2.layers"), "Conv2d", nn.Conv2d)
    return (nn.Conv2d, CenConv2d, wrapper)


def _centre(name: str, old: nn.Conv2d) -> CenConv2d:
    try:
        new = CenConv2d(
            old.in_channels,
            old.out_channels,
            old.kernel_size,  # type: ignore[arg-type]
            **{name: getattr(old, name) for name in _KEPT},
            bias=False,
            norm=getattr(old, "norm", None),
            activation=getattr(old, "activation", None),
            device="meta",  # the weight is the old one: nothing is drawn
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    new.weight = old.weight
    return new.train(old.training)


def mabn_without_statistics(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """Name the MABN layers that would get weights from a state dict, but no mean square.

    That they were trained with another norm shows in the absent ``running_mean_square`` only: the
    filters tell nothing, as centring projects the gradient and leaves the filters' means alone.

    Args:
        state_dict: with the module's entries under ``prefix`` (which ends with a dot, unless it is
            empty); the official MABN code's layout counts as having the statistics.

    Returns:
        names (with the prefix) of layers of which the state dict has an entry, or the weight of the
        convolution before, but not the mean square.
    """
    names = []
    for parent_name, parent in module.named_modules():
        above = f"{prefix}{parent_name}." if parent_name else prefix
        convolution = above + "weight"
        for name, layer in parent.named_children():
            own = f"{above}{name}."
            if isinstance(layer, MABN2d):
                used = convolution in state_dict or any(key.startswith(own) for key in state_dict)
                there = own + "running_mean_square" in state_dict
                if used and not there and not is_official(state_dict, own):
                    names.append(own[:-1])
            convolution = own + "weight"
    return names


def warn_of_missing_statistics(module: nn.Module) -> None:
    """Make a module warn, in one line, when it loads weights without their MABN statistics."""
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
