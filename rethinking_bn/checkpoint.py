"""Weights in files and state dicts: reading them safely, and keys between layouts; torch only.

Between shared and domain-specific statistics a layer converts by itself when it loads:
:class:`~rethinking_bn.layers.MultiDomainBatchNorm2d` accepts either under any checkpointer.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rethinking_bn.layers.bn_like import find_bn_like
from rethinking_bn.layers.domain_state import DomainBatchNormBase
from rethinking_bn.layers.ring import convert_official

logger = logging.getLogger(__name__)

# torchvision's names of a ResNet's parts, after what the MABN code puts before them
_RESNET = re.compile(
    r"^(?:module\.)?(?:backbone\.body\.)?(?:(?P<stem>(?:stem\.)?)|layer(?P<stage>\d)\.(?P<block>\d+)\.)"
    r"(?P<part>conv|bn|downsample\.)(?P<index>\d)\.(?P<rest>.+)$"
)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


# numpy's names of what an array in a file may hold
_DTYPES = {
    **{"b1": torch.bool, "u1": torch.uint8, "i1": torch.int8, "i2": torch.int16},
    **{"i4": torch.int32, "i8": torch.int64},
    **{"f2": torch.float16, "f4": torch.float32, "f8": torch.float64},
}


class _DType:
    """A pickle's numpy.dtype; numpy's own believes flags by which bytes become pointers."""

    def __init__(self, name: str, *_: Any) -> None:
        if name not in _DTYPES:
            raise ValueError(f"it has an array of the type {name}")
        self.dtype = _DTYPES[name]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":
            raise ValueError("its numbers are big-endian")

    def read(self, data: str | bytes) -> Tensor:
        data = data.encode("latin1") if isinstance(data, str) else data  # of Python 2
        if not data:  # which frombuffer refuses
            return torch.empty(0, dtype=self.dtype)
        return torch.frombuffer(bytearray(data), dtype=self.dtype)


class _Array:
    """A pickle's numpy.ndarray."""

    def __init__(self, *_: Any) -> None:
        self.tensor = torch.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_columns, data = state
        flat = dtype.read(data)
        turned = range(len(shape))[::-1]
        self.tensor = flat.view(shape[::-1]).permute(*turned) if by_columns else flat.view(shape)


def _tensors(content: Any) -> Any:
    """Return what a pickle holds with its arrays as tensors."""
    if isinstance(content, dict):
        return {key: _tensors(value) for key, value in content.items()}
    return content.tensor if isinstance(content, _Array) else content


_STAND_INS: dict[str, Any] = {
    "numpy.dtype": _DType,
    "numpy.ndarray": None,  # an argument of the next
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": lambda dtype, data: dtype.read(data)[0].item(),
}


class _PlainUnpickler(pickle.Unpickler):
    """Reads arrays of numbers, numbers, text and plain containers, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("._core.", ".core.")
        if full in ("_codecs.encode", "collections.OrderedDict"):
            return super().find_class(module, name)
        if full in _STAND_INS:
            return _STAND_INS[full]
        raise pickle.UnpicklingError(
            f"it names {module}.{name}; only arrays and plain containers are read, as anything "
            "else can execute code"
        )


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a checkpoint file holds, on the CPU; nothing in the file can execute code.

    Every reader of weights in this package and its tools comes here: of pickles of arrays (".pkl",
    as in detectron2's model zoo), which become tensors, else of torch's format.

    Raises:
        OSError: for a file that cannot be opened.
        ValueError: in one line, for one that holds no dict.
    """
    try:
        if str(path).endswith(".pkl"):
            with open(path, "rb") as file:
                content = _tensors(_PlainUnpickler(file, encoding="latin1").load())
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch.load and pickle raise nearly anything
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise _unreadable(path, f"it holds a {type(content).__name__}")
    return content


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the model's state dict from a checkpoint of any trainer, on the CPU.

    Raises:
        OSError, ValueError: as :func:`read_file`, and for a file without a state dict of tensors.
    """
    content = read_file(path)
    weights = content.get("model", content)
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
        )
    ):
        raise _unreadable(path, "it holds no state dict of tensors")
    return dict(weights)


def _unreadable(path: str | os.PathLike[str], why: str) -> ValueError:
    shortened = textwrap.shorten(why, 160, placeholder=" ...")
    return ValueError(f"{path} cannot be read as a checkpoint ({shortened})")


def require_statistics(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    error_msgs: list[str],
    *,
    allow_missing: bool = False,
) -> None:
    """Refuse weights that lack population statistics; to be called before a module loads them.

    A state dict without any key of the module (an ImageNet backbone, say) lacks nothing: the module
    starts anew. One with some of its weights but without its statistics, because they were trained
    with another norm or none, would leave mean 0 and variance 1 under trained weights. MABN, whose
    convolutions warn, has neither. A layer with several domains takes the statistics of either
    layout, and else demands all its entries.

    Args:
        module, state_dict, prefix: norm layers, and a state dict with their entries under a prefix,
            which ends with a dot unless it is empty.
        error_msgs: gets one message, with the config key that allows it.
        allow_missing: instead, ``state_dict`` gets what the module has, and the log says so.
    """
    missing: dict[str, Tensor] = {}
    keys = {key for key in state_dict if key.startswith(prefix)}
    for found in find_bn_like(module).layers if keys else ():
        below = f"{prefix}{found.name}." if found.name else prefix
        several = isinstance(found.module, DomainBatchNormBase)
        if several and {below + "running_mean", below + "0.running_mean"} & keys:
            continue
        for entry, value in found.module.state_dict().items():
            if (several or entry in _STATISTICS[:2]) and below + entry not in keys:
                missing[below + entry] = value
    if not missing:
        return
    first = next(key for key in missing if key.endswith(_STATISTICS[:2]))
    if allow_missing:
        state_dict.update(missing)
        logger.warning(
            "%d entries of norm layers are not in the checkpoint (%s, ...) and stay as they are "
            "(MODEL.ALLOW_MISSING_STATISTICS)",
            len(missing),
            first,
        )
    else:
        error_msgs.append(
            f"{first} is not in the checkpoint, which has other weights of this head: it was "
            "trained with another norm layer, or without one; MODEL.ALLOW_MISSING_STATISTICS True "
            "starts from mean 0, variance 1"
        )


def select_domain(state_dict: Mapping[str, Tensor], domain: int) -> dict[str, Tensor]:
    """Return the weights of a model with domains in its data, as plain BatchNorms of one domain.

    Args:
        state_dict: of a model with :class:`~rethinking_bn.layers.SplitBatchNorm2d` layers.
        domain: from 0.

    Raises:
        ValueError: when no layer has domains, they disagree about how many, or have not so many;
            for a RetinaNet head's feature levels: only the head has several sets of statistics, and
            not another number than its pyramid has levels.
    """
    sets = _sets(state_dict)
    numbers = sorted(set(sets.values()))
    if len(numbers) != 1:
        found = f"they have {numbers}" if numbers else "there is none"
        raise ValueError(f"layers with one number of domains in all are needed; {found}")
    pyramid = {key for key in state_dict if re.search(r"\.(fpn_output\d|p[67])\.weight$", key)}
    if all(name.startswith("head.") for name in sets) and len(pyramid) in (0, numbers[0]):
        raise ValueError(
            f"only the head has {numbers[0]} sets of statistics: these are feature levels, not "
            "domains in the data; for detectron2's RetinaNetHead give --levels instead of --domain"
        )
    if not 0 <= domain < numbers[0]:
        raise ValueError(f"the checkpoint has the domains 0 to {numbers[0] - 1}, not {domain}")
    selected = {}
    for key, value in state_dict.items():
        name, child, entry = _split(key)
        if name in sets and child.isdigit():
            if int(child) != domain:
                continue
            key = f"{name}.{entry}" if name else entry
        selected[key] = value
    return selected


def copy_to_levels(state_dict: Mapping[str, Tensor], num_levels: int) -> dict[str, Tensor]:
    """Return the weights of a RetinaNet for detectron2's own RetinaNetHead with NORM BN.

    That has statistics per level and one affine. Rows 2 and 4 of Table 5 (arXiv 2105.07576), which
    have the same, stay as they are; the shared statistics of rows 1 and 3 are copied to each level.

    Args:
        state_dict: of a RetinaNet; layers below ``head.`` with statistics are rewritten.
        num_levels: L.

    Raises:
        ValueError: for affines per level (rows 5 and 6), another number of levels, or a head
            without BatchNorm statistics.
    """
    in_head = [key for key in state_dict if key.startswith("head.")]
    per_level = {name: n for name, n in _sets(state_dict).items() if name.startswith("head.")}
    for name, number in per_level.items():
        if f"{name}.0.weight" in state_dict:
            raise ValueError(
                f"{name} has an affine for each of {number} levels (rows 5 and 6 of Table 5), but "
                "detectron2's RetinaNetHead has one affine for all"
            )
        if number != num_levels:
            raise ValueError(f"{name} has statistics of {number} levels, not {num_levels}")
    if not any(key.endswith(".running_var") for key in in_head):
        raise ValueError("no layer below head. has BatchNorm's running_mean and running_var")
    copied: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        layer, _, entry = key.rpartition(".")
        shared = layer.startswith("head.") and entry in _STATISTICS
        shared = shared and layer.rpartition(".")[0] not in per_level
        keys = [f"{layer}.{i}.{entry}" for i in range(num_levels)] if shared else [key]
        copied.update({new: value.clone() for new in keys})
    return copied


def _split(key: str) -> tuple[str, str, str]:
    """Return layer, set and entry: ("head.norm", "0", "weight") of "head.norm.0.weight"."""
    above, _, entry = key.rpartition(".")
    name, _, child = above.rpartition(".")
    return name, child, entry


def _sets(state_dict: Mapping[str, Any]) -> dict[str, int]:
    """Return the layers with several sets of statistics or affines, and how many."""
    children: dict[str, set[int]] = {}
    for key in state_dict:
        name, child, entry = _split(key)
        mean = f"{name}.running_mean" if name else "running_mean"
        if child.isdigit() and (
            entry == "running_mean" or (entry == "weight" and mean in state_dict)
        ):
            children.setdefault(name, set()).add(int(child))
    # a lone BatchNorm in an nn.Sequential has no sets
    return {n: len(c) for n, c in children.items() if c == set(range(len(c))) and len(c) > 1}


def convert_mabn_checkpoint(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of the official MABN code, rewritten for this package's layers.

    :class:`~rethinking_bn.layers.MABN2d` itself loads the official layout of a layer; here the
    parts of a ResNet get detectron2's names, too (``layer1.0.bn2.weight`` becomes
    ``res2.0.conv2.norm.weight``). Saved with ``torch.save``, the result loads as ``MODEL.WEIGHTS:
    path.pth?matching_heuristics=True``, under which detectron2 adds the prefix of the model.

    Args:
        state_dict: of the classification or the detection code; other parts keep their names.

    Raises:
        ValueError: when it has no layer of the official code, or two keys become one.
    """
    converted: dict[str, Tensor] = dict(state_dict)
    found = [key[: -len("running_var")] for key in state_dict if key.endswith("running_var")]
    if not [prefix for prefix in found if convert_official(converted, prefix)]:
        raise ValueError(
            "no layer of the official MABN code: no running_var of shape (1, C, 1, 1), none beside "
            "a sta_matrix"
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
