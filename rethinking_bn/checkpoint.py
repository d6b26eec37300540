"""Norm statistics in checkpoints: which layout they have, converting it, noticing their absence.

Loading converts by itself: :class:`~rethinking_bn.layers.MultiDomainBatchNorm2d` accepts either
layout under any checkpointer. The functions here look at whole state dicts, of our models and of
detectron2's (``CycleBatchNormList`` heads have the domain-specific layout with a shared affine,
a BatchNorm2d over all levels has the shared one).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from rethinking_bn.layers import MultiDomainBatchNorm2d, PopulationLayer
from rethinking_bn.layers.domain_state import Choice, DomainBatchNormBase, check_choice
from rethinking_bn.layers.mabn.centring import mabn_without_statistics as mabn_without_statistics
from rethinking_bn.layers.mabn.official import convert_official

_MEAN = re.compile(r"^(?:(?P<layer>.+)\.)?running_mean$")
_LEVEL_MEAN = re.compile(r"^(?:(?P<layer>.+)\.)?(?P<level>\d+)\.running_mean$")
# torchvision's names of a ResNet's parts, after what the MABN code puts before them
_RESNET = re.compile(
    r"^(?:module\.)?(?:backbone\.body\.)?(?:(?P<stem>(?:stem\.)?)|layer(?P<stage>\d)\.(?P<block>\d+)\.)"
    r"(?P<part>conv|bn|downsample\.)(?P<index>\d)\.(?P<rest>.+)$"
)
_STATISTICS = ("running_mean", "running_var")


class NormLayout(NamedTuple):
    """How a checkpoint holds one norm layer.

    Attributes:
        statistics: "shared" or "domain_specific".
        affine: likewise, or None without an affine.
        num_domains: domains that are told apart; 1 when everything is shared.
        num_features: channels C.
    """

    statistics: Choice
    affine: Choice | None
    num_domains: int
    num_features: int


def describe_checkpoint(
    state_dict: Mapping[str, Any], prefix: str = "head."
) -> dict[str, NormLayout]:
    """Say which norm layers with population statistics a state dict has, and their layouts.

    Statistics ``<layer>.0.running_mean`` ... ``<layer>.<L-1>.running_mean`` with L of at least 2
    and equal channels are read as domain-specific: nothing else in a state dict tells them from L
    layers that directly follow each other.

    Args:
        state_dict: a model's state dict, keys to arrays or tensors.
        prefix: only layers below it; the default is RetinaNet's head in detectron2.

    Returns:
        layer name (with the prefix) to layout, in the order of the state dict.
    """
    found = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
    levels: dict[str, dict[int, int]] = {}
    for key, value in found.items():
        if (match := _LEVEL_MEAN.match(key)) is not None:
            levels.setdefault(match["layer"] or "", {})[int(match["level"])] = len(value)
    domains = {
        layer: len(channels)
        for layer, channels in levels.items()
        if len(channels) > 1
        and sorted(channels) == list(range(len(channels)))
        and len(set(channels.values())) == 1
    }
    layouts: dict[str, NormLayout] = {}
    for key, value in found.items():
        level_match, match = _LEVEL_MEAN.match(key), _MEAN.match(key)
        if level_match is not None and (level_match["layer"] or "") in domains:
            name = level_match["layer"] or ""
            layouts[name] = _layout(found, name, "domain_specific", domains[name], len(value))
        elif match is not None:
            name = match["layer"] or ""
            layouts[name] = _layout(found, name, "shared", 1, len(value))
    return layouts


def _layout(
    state_dict: Mapping[str, Any], name: str, statistics: Choice, num_domains: int, channels: int
) -> NormLayout:
    below = f"{name}." if name else ""
    affine: Choice | None = None
    if f"{below}weight" in state_dict:
        affine = "shared"
    elif f"{below}0.weight" in state_dict:
        affine = "domain_specific"
        separate = re.compile(re.escape(below) + r"\d+\.weight")
        num_domains = sum(separate.fullmatch(key) is not None for key in state_dict)
    return NormLayout(statistics, affine, num_domains, channels)


def convert_statistics(
    state_dict: Mapping[str, Tensor],
    *,
    to: Choice,
    num_domains: int | None = None,
    prefix: str = "head.",
) -> dict[str, Tensor]:
    """Rewrite the population statistics of every norm layer below ``prefix``; affines stay.

    Shared statistics become one copy per domain. Domain-specific ones become their equal-weight
    mixture (their counts are unknown): mean of the means, and mean of the variances plus variance
    of the means. Either way they are a starting point: population training is due.

    Args:
        state_dict: of a model; not modified.
        to: "shared" or "domain_specific".
        num_domains: L; needed for ``to="domain_specific"`` where the checkpoint does not show it.
        prefix: only layers below it; the default is RetinaNet's head in detectron2.

    Returns:
        a new state dict, layers without statistics as they were.

    Raises:
        ValueError: naming the key, where nothing can be converted or a number of domains
            contradicts another.
    """
    check_choice("to", to)
    layouts = describe_checkpoint(state_dict, prefix)
    if not layouts:
        raise ValueError(f"no key {prefix}*.running_mean in the checkpoint: nothing to convert")
    converted = dict(state_dict)
    for name, layout in layouts.items():
        if layout.statistics == to:
            _check_domains(name, layout, num_domains)
            continue
        if layout.num_domains > 1:
            _check_domains(name, layout, num_domains)
        domains = layout.num_domains if layout.num_domains > 1 else num_domains
        if domains is None:
            raise ValueError(f"{name}: num_domains must say how many copies to make")
        if layout.affine is None:
            raise ValueError(f"{name}.weight is not in the checkpoint: a layer without an affine")
        below = f"{name}." if name else ""
        own = {
            key: converted.pop(key) for key in [key for key in converted if key.startswith(below)]
        }
        layer = MultiDomainBatchNorm2d(
            layout.num_features, domains, population_stats=to, affine=layout.affine
        )
        # a layer converts what it is about to load, in place
        errors: list[str] = []
        layer._load_from_state_dict(own, below, {}, True, [], [], errors)
        if errors:
            raise ValueError("; ".join(errors))
        converted.update(own)
    return converted


def _check_domains(name: str, layout: NormLayout, num_domains: int | None) -> None:
    if layout.num_domains > 1 and num_domains not in (None, layout.num_domains):
        raise ValueError(f"{name} has {layout.num_domains} domains, not {num_domains}")


def missing_statistics(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """Name the population statistics that a module would not get from a state dict.

    A state dict without any key of the module (an ImageNet backbone, say) lacks nothing: the module
    starts anew. One with some of its weights but without its statistics, because they were trained
    with another norm or none, would leave mean 0 and variance 1 under trained weights. Of MABN's
    mean square speaks :func:`mabn_without_statistics`.

    Args:
        module: holds norm layers.
        state_dict: with the module's entries under ``prefix``.
        prefix: ends with a dot, unless it is empty.

    Returns:
        one message per absent buffer, each beginning with the key; a layer that judges its own
        entries (the multi-domain ones do) appears only where it has none.
    """
    keys = [key for key in state_dict if key.startswith(prefix)]
    messages = []
    for name, layer in module.named_modules():
        is_norm = isinstance(layer, (PopulationLayer, nn.modules.batchnorm._BatchNorm))
        if not keys or not is_norm:
            continue
        below = f"{prefix}{name}." if name else prefix
        own = [key for key in keys if key.startswith(below)]
        if own and isinstance(layer, DomainBatchNormBase):
            continue
        for buffer, _ in layer.named_buffers():
            if buffer.rpartition(".")[2] in _STATISTICS and below + buffer not in own:
                messages.append(
                    f"{below}{buffer} is not in the checkpoint, which has other weights of this "
                    "head: it was trained with another norm layer, or without one"
                )
    return messages


def convert_mabn_checkpoint(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rewrite a state dict of the official MABN code for this package's layers.

    :class:`~rethinking_bn.layers.MABN2d` itself loads the official layout of a layer; this
    function also gives the parts of a ResNet detectron2's names without a prefix
    (``layer1.0.bn2.weight`` becomes ``res2.0.conv2.norm.weight``). Saved with ``torch.save``, the
    result loads as ``MODEL.WEIGHTS: path.pth?matching_heuristics=True``, under which detectron2
    adds the prefix of the model.

    Args:
        state_dict: not modified. Of the classification code or the detection code; parts other than
            the ResNet keep their names.

    Returns:
        a new state dict.

    Raises:
        ValueError: when it has no layer of the official code, or two keys become one.
    """
    converted: dict[str, Tensor] = dict(state_dict)
    found = [key[: -len("running_var")] for key in state_dict if key.endswith("running_var")]
    if not [prefix for prefix in found if convert_official(converted, prefix)]:
        raise ValueError(
            "the checkpoint has no layer of the official MABN code: no running_var of shape "
            "(1, C, 1, 1), none beside a sta_matrix"
        )
    renamed = {_detectron2_name(key): value for key, value in converted.items()}
    if len(renamed) < len(converted):
        raise ValueError("the checkpoint has a ResNet's parts twice, under different names")
    return renamed


def _detectron2_name(key: str) -> str:
    match = _RESNET.match(key)
    if match is None:
        return key
    part, index = match["part"], match["index"]
    if match["stage"] is None and part == "downsample.":
        return key
    above = "stem." if match["stage"] is None else f"res{int(match['stage']) + 1}.{match['block']}."
    if part == "downsample.":
        return f"{above}shortcut.{'norm.' if index == '1' else ''}{match['rest']}"
    return f"{above}conv{index}.{'norm.' if part == 'bn' else ''}{match['rest']}"
