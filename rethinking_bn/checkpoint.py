"""Norm statistics in checkpoints: noticing their absence, and reading the MABN authors' files.

Between shared and domain-specific statistics a layer converts by itself when it loads:
:class:`~rethinking_bn.layers.MultiDomainBatchNorm2d` accepts either under any checkpointer.
"""

from __future__ import annotations

import logging
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rethinking_bn.layers import PopulationLayer
from rethinking_bn.layers.domain_state import DomainBatchNormBase
from rethinking_bn.layers.mabn.centring import mabn_without_statistics as mabn_without_statistics
from rethinking_bn.layers.mabn.official import convert_official

logger = logging.getLogger(__name__)

# torchvision's names of a ResNet's parts, after what the MABN code puts before them
_RESNET = re.compile(
    r"^(?:module\.)?(?:backbone\.body\.)?(?:(?P<stem>(?:stem\.)?)|layer(?P<stage>\d)\.(?P<block>\d+)\.)"
    r"(?P<part>conv|bn|downsample\.)(?P<index>\d)\.(?P<rest>.+)$"
)
_STATISTICS = ("running_mean", "running_var")


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the model's state dict from a checkpoint of any trainer, on the CPU.

    Raises:
        OSError: for a file that cannot be read.
        ValueError: in one line, for one that holds no state dict of tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch.load raises nearly anything
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
        raise ValueError(f"{path} is no checkpoint that torch can load ({why})") from error
    weights = content.get("model", content) if isinstance(content, dict) else None
    tensors = isinstance(weights, dict) and all(isinstance(v, Tensor) for v in weights.values())
    if not tensors or not weights:
        raise ValueError(f"{path} holds no state dict of tensors")
    return dict(weights)


def select_domain(state_dict: Mapping[str, Tensor], domain: int) -> dict[str, Tensor]:
    """Return the state dict of the model that a model with domains in the data is for one domain.

    Layers with statistics or affines per domain become plain BatchNorms with those of ``domain``;
    all other entries stay.

    Args:
        state_dict: of a model with :class:`~rethinking_bn.layers.SplitBatchNorm2d` layers.
        domain: from 0.

    Raises:
        ValueError: when no layer has domains, they disagree about how many, or have not so many.
    """
    children: dict[str, set[int]] = {}
    for key in state_dict:
        layer, _, entry = key.rpartition(".")
        name, _, child = layer.rpartition(".")
        below = f"{name}." if name else ""
        apart = entry == "running_mean" or (
            entry == "weight" and below + "running_mean" in state_dict
        )
        if child.isdigit() and apart:
            children.setdefault(name, set()).add(int(child))
    # a lone BatchNorm in an nn.Sequential is no layer with domains
    domains = {n: len(c) for n, c in children.items() if c == set(range(len(c))) and len(c) > 1}
    numbers = sorted(set(domains.values()))
    if len(numbers) != 1:
        raise ValueError(f"one number of domains in all layers is needed, there are {numbers}")
    if not 0 <= domain < numbers[0]:
        raise ValueError(f"the checkpoint has the domains 0 to {numbers[0] - 1}, not {domain}")
    selected = {}
    for key, value in state_dict.items():
        layer, _, entry = key.rpartition(".")
        name, _, child = layer.rpartition(".")
        if name in domains and child.isdigit():
            if int(child) != domain:
                continue
            key = f"{name}.{entry}" if name else entry
        selected[key] = value
    return selected


def copy_to_levels(state_dict: Mapping[str, Tensor], num_levels: int) -> dict[str, Tensor]:
    """Give a RetinaNet head's shared statistics to each level, as detectron2's own head has them.

    Args:
        state_dict: of a RetinaNet; layers below ``head.`` with statistics are rewritten.
        num_levels: L.

    Returns:
        a new state dict, for detectron2's CycleBatchNormList.
    """
    copied: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        layer, _, entry = key.rpartition(".")
        is_statistic = entry in (*_STATISTICS, "num_batches_tracked")
        levels = range(num_levels) if key.startswith("head.") and is_statistic else ()
        copied.update({f"{layer}.{level}.{entry}": value.clone() for level in levels})
        if not levels:
            copied[key] = value
    return copied


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
    return [
        f"{key} is not in the checkpoint, which has other weights of this head: it was trained "
        "with another norm layer, or without one"
        for key, _ in _missing(module, state_dict, prefix)
    ]


def require_statistics(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    error_msgs: list[str],
    *,
    allow_missing: bool,
) -> None:
    """Let a module that loads weights refuse them if they lack its statistics, or start anew.

    For ``_load_from_state_dict`` of a head.

    Args:
        module, state_dict, prefix: as for :func:`missing_statistics`.
        error_msgs: gets its messages, and the config key that allows it.
        allow_missing: instead, what is missing is taken from the module, in place in
            ``state_dict``, and the log says so.
    """
    messages = missing_statistics(module, state_dict, prefix)
    added: dict[str, Tensor] = {}
    if any(key.startswith(prefix) for key in state_dict):
        for name, layer in module.named_modules():
            below = f"{prefix}{name}." if name else prefix
            there = [key for key in state_dict if key.startswith(below)]
            if isinstance(layer, DomainBatchNormBase) and not any(
                key.endswith("running_mean") for key in there
            ):  # it demands its other entries, too
                added.update({below + key: value for key, value in layer.state_dict().items()})
    if not allow_missing:
        error_msgs.extend(messages)
        if messages or added:
            error_msgs.append("MODEL.ALLOW_MISSING_STATISTICS True starts from mean 0, variance 1")
        return
    added.update(_missing(module, state_dict, prefix))
    added = {key: value for key, value in added.items() if key not in state_dict}
    state_dict.update(added)
    if added:
        logger.warning(
            "%d entries of norm layers are not in the checkpoint (%s, ...) and stay as they are "
            "(MODEL.ALLOW_MISSING_STATISTICS)",
            len(added),
            next(iter(added)),
        )


def _missing(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield key and present value of every statistic that is missing."""
    keys = [key for key in state_dict if key.startswith(prefix)]
    for name, layer in module.named_modules() if keys else ():
        is_norm = isinstance(layer, (PopulationLayer, nn.modules.batchnorm._BatchNorm))
        if not is_norm:
            continue
        below = f"{prefix}{name}." if name else prefix
        own = [key for key in keys if key.startswith(below)]
        if own and isinstance(layer, DomainBatchNormBase):
            continue
        for buffer, value in layer.named_buffers():
            if buffer.rpartition(".")[2] in _STATISTICS and below + buffer not in own:
                yield below + buffer, value


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
