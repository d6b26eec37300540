"""MABN's convolutions in a built model are centred; weights without its statistics are noticed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
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
    for prefix, parent in module.named_modules():
        before: nn.Module | None = None
        for place, child in parent._modules.items():
            if child is not None and isinstance(replaced.get(child, child), MABN2d):
                name = f"{prefix}.{place}" if prefix else place
                old = _convolution_of(name, child, parent if place == "norm" else before)
                if not isinstance(old, CenConv2d):
                    centred[old] = _centre(name, old)
            before = child if getattr(child, "norm", None) is None else None
    return centred


def _convolution_of(name: str, norm: nn.Module, found: nn.Module | None) -> nn.Conv2d:
    # a model can only hold detectron2's layers where they were imported
    wrapper = getattr(sys.modules.get("detectron2.layers"), "Conv2d", nn.Conv2d)
    if type(found) not in (nn.Conv2d, CenConv2d, wrapper) or not isinstance(found, nn.Conv2d):
        what = "nothing" if found is None else type(found).__name__
        raise ValueError(
            f"{name}: MABN needs a plain convolution before it, whose filters can be centred, "
            f"but there is {what}"
        )
    channels, before = norm_channels(norm), found.out_channels
    if before != channels:
        raise ValueError(f"{name} has {channels} channels, but the convolution has {before}")
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


def warn_of_missing_statistics(module: nn.Module) -> None:
    """Make a module warn, in one line, when it loads weights without their MABN statistics."""
    hooks = module._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", None) is _check_statistics for hook in hooks):
        module._register_load_state_dict_pre_hook(_check_statistics, with_module=True)


def _check_statistics(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Warn of MABN layers that get weights, or whose convolution does, but no mean square.

    That they were trained with another norm shows in nothing else: centring projects the gradient
    and leaves the filters' means alone. The official MABN code's layout has the mean square.
    """
    missing = []
    for parent_name, parent in module.named_modules():
        above = f"{prefix}{parent_name}." if parent_name else prefix
        convolution = above + "weight"
        for name, layer in parent.named_children():
            own = f"{above}{name}."
            if isinstance(layer, MABN2d):
                used = convolution in state_dict or any(key.startswith(own) for key in state_dict)
                there = own + "running_mean_square" in state_dict or is_official(state_dict, own)
                if used and not there:
                    missing.append(own[:-1])
            convolution = own + "weight"
    if missing:
        logger.warning(
            "%d MABN layers get weights without running_mean_square (%s, ...), so these were not "
            "trained with MABN: load MABN weights, or train or re-estimate the statistics "
            "(TEST.PRECISE_BN.ENABLED True) before evaluating, else AP will be far too low",
            len(missing),
            missing[0],
        )
