"""Weights in files and state dicts: reading them safely, and keys between layouts; torch only.

Between shared and domain-specific statistics a layer converts by itself when it loads:
:class:`~rethinking_bn.layers.MultiDomainBatchNorm2d` accepts either under any checkpointer.
"""

from __future__ import annotations

import codecs
import logging
import os
import pickle
import re
import textwrap
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rethinking_bn.layers.bn_like import find_bn_like
from rethinking_bn.layers.multi_domain import DomainBatchNormBase
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
        empty = torch.empty(0, dtype=self.dtype)
        return torch.frombuffer(bytearray(data), dtype=self.dtype) if data else empty


class _Array:
    """A pickle's numpy.ndarray."""

    def __init__(self, *_: Any) -> None:
        self.tensor = torch.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_columns, data = state
        flat, dims = dtype.read(data), range(len(shape))[::-1]
        self.tensor = flat.view(shape[::-1]).permute(*dims) if by_columns else flat.view(shape)


def _tensors(content: Any) -> Any:
    """Return what a pickle holds with its arrays as tensors."""
    if isinstance(content, dict):
        return {key: _tensors(value) for key, value in content.items()}
    return content.tensor if isinstance(content, _Array) else content


# all that a pickle may name
_STAND_INS: dict[str, Any] = {
    "_codecs.encode": codecs.encode,
    "collections.OrderedDict": OrderedDict,
    "numpy.dtype": _DType,
    "numpy.ndarray": None,  # an argument of the next
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": lambda dtype, data: dtype.read(data)[0].item(),
}


class _PlainUnpickler(pickle.Unpickler):
    """Reads arrays of numbers, numbers, text and plain containers, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("._core.", ".core.")
        if full not in _STAND_INS:
            raise pickle.UnpicklingError(f"it names {full}, which can execute code")
        return _STAND_INS[full]


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a checkpoint file holds, on the CPU; nothing in the file can execute code.

    Every reader of weights comes here: of pickles of arrays (".pkl", as in detectron2's model zoo),
    which become tensors, or of torch's format. An OSError where a file cannot be opened, a
    ValueError of one line where it holds no dict.
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
    entries = weights.items() if isinstance(weights, dict) else ()
    if not entries or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in entries):
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

    Weights trained with another norm or none would leave mean 0 and variance 1 under them. A state
    dict without any key of the module, as of a backbone, lacks nothing, and MABN's convolutions
    warn by themselves. A layer with several domains takes the statistics of either layout, and
    else demands all its entries.

    Args:
        module, state_dict, prefix: norm layers, and a state dict with their entries under a prefix.
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
        what = f"{len(missing)} entries of norm layers are not in the checkpoint ({first}, ...)"
        logger.warning("%s and stay as they are (MODEL.ALLOW_MISSING_STATISTICS)", what)
    else:
        error_msgs.append(
            f"{first} is not in the checkpoint, whose weights of this head are of another "
            "norm or none; MODEL.ALLOW_MISSING_STATISTICS True starts from mean 0, variance 1"
        )


def select_domain(state_dict: Mapping[str, Tensor], domain: int) -> dict[str, Tensor]:
    """Return the weights of a model with domains in its data, as plain BatchNorms of one domain.

    Args:
        state_dict: of a model with :class:`~rethinking_bn.layers.SplitBatchNorm2d` layers.
        domain: from 0.

    Raises:
        ValueError: when no layer has domains, they disagree about how many, or have not so many;
            for a RetinaNet head's feature levels: only the head has several sets of statistics, as
            many as its pyramid has levels.
    """
    sets = _sets(state_dict)
    number, *others = sorted(set(sets.values())) or [0]
    if others or not number:
        found = f"they have {[number, *others]}" if number else "there is none"
        raise ValueError(f"layers with one number of domains in all are needed; {found}")
    pyramid = {key for key in state_dict if re.search(r"\.(fpn_output\d|p[67])\.weight$", key)}
    if all(name.startswith("head.") for name in sets) and len(pyramid) in (0, number):
        raise ValueError(
            f"only the head has {number} sets of statistics: these are feature levels, not "
            "domains in the data; for detectron2's RetinaNetHead give --levels instead of --domain"
        )
    if not 0 <= domain < number:
        raise ValueError(f"the checkpoint has the domains 0 to {number - 1}, not {domain}")
    selected = {}
    for key, value in state_dict.items():
        name, child, entry = _split(key)
        if name not in sets or not child.isdigit():
            selected[key] = value
        elif int(child) == domain:
            selected[f"{name}.{entry}" if name else entry] = value
    return selected


def copy_to_levels(state_dict: Mapping[str, Tensor], num_levels: int) -> dict[str, Tensor]:
    """Return the weights of a RetinaNet for detectron2's own RetinaNetHead with NORM BN.

    That has statistics per level and one affine, as rows 2 and 4 of Table 5 (arXiv 2105.07576). The
    shared statistics of rows 1 and 3, below ``head.``, are copied to each of the levels.

    Raises:
        ValueError: for affines per level (rows 5 and 6), another number of levels, or a head
            without BatchNorm statistics.
    """
    per_level = {name: n for name, n in _sets(state_dict).items() if name.startswith("head.")}
    for name, number in per_level.items():
        if f"{name}.0.weight" in state_dict:
            one = "detectron2's RetinaNetHead has one"
            raise ValueError(f"{name} has {number} affines (rows 5 and 6 of Table 5), {one}")
        if number != num_levels:
            raise ValueError(f"{name} has statistics of {number} levels, not {num_levels}")
    if not any(key.startswith("head.") and key.endswith(".running_var") for key in state_dict):
        raise ValueError("no layer below head. has BatchNorm's running_mean and running_var")
    copied: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        layer, _, entry = key.rpartition(".")
        shared = layer.startswith("head.") and layer.rpartition(".")[0] not in per_level
        levels = range(num_levels) if shared and entry in _STATISTICS else ()
        copied |= {new: value.clone() for new in [f"{layer}.{i}.{entry}" for i in levels] or [key]}
    return copied


def _split(key: str) -> list[str]:
    """Return layer, set and entry: ["head.norm", "0", "weight"] of "head.norm.0.weight"."""
    return ["", "", *key.rsplit(".", 2)][-3:]


def _sets(state_dict: Mapping[str, Any]) -> dict[str, int]:
    """Return the layers with several sets of statistics or affines, and how many."""
    children: dict[str, set[int]] = {}
    for key in state_dict:
        name, child, entry = _split(key)
        mean = f"{name}.running_mean" if name else "running_mean"
        affine = entry == "weight" and mean in state_dict
        if child.isdigit() and (affine or entry == "running_mean"):
            children.setdefault(name, set()).add(int(child))
    # a lone BatchNorm in an nn.Sequential has no sets
    return {n: len(c) for n, c in children.items() if c == set(range(len(c))) and len(c) > 1}


def convert_mabn_checkpoint(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of the official MABN code, rewritten for this package's layers.

    :class:`~rethinking_bn.layers.MABN2d` itself loads the official layout of a layer; here the
    parts of a ResNet get detectron2's names, too (``layer1.0.bn2.weight`` becomes
    ``res2.0.conv2.norm.weight``). Saved with ``torch.save``, the result loads as ``MODEL.WEIGHTS:
    path.pth?matching_heuristics=True``, under which detectron2 adds the prefix of the model.

    Raises:
        ValueError: when no layer is of the official code, or two keys become one.
    """
    converted: dict[str, Tensor] = dict(state_dict)
    found = [key.removesuffix("running_var") for key in state_dict if key.endswith("running_var")]
    if not [prefix for prefix in found if convert_official(converted, prefix)]:
        wanted = "a running_var of shape (1, C, 1, 1), or one beside a sta_matrix"
        raise ValueError(f"no layer of the official MABN code: none has {wanted}")
    renamed = {_detectron2_name(key): value for key, value in converted.items()}
    if len(renamed) < len(converted):
        raise ValueError("the checkpoint has a ResNet's parts twice, under different names")
    return renamed


def _detectron2_name(key: str) -> str:
    match = _RESNET.match(key)
    if match is None or (match["stage"] is None and match["part"] == "downsample."):
        return key
    part, index = match["part"], match["index"]
    above = "stem." if match["stage"] is None else f"res{int(match['stage']) + 1}.{match['block']}."
    shortcut = part == "downsample."
    norm = "norm." if part == "bn" or (shortcut and index == "1") else ""
    return f"{above}{'shortcut' if shortcut else f'conv{index}'}.{norm}{match['rest']}"
