"""Config files as data: merged with their bases and overrides, never executed."""

from __future__ import annotations

import importlib
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.utils.file_io import PathManager

from rethinking_bn.config import add_rethinking_bn_config
from rethinking_bn.data.register import register_coco_format


def load_config(
    config_file: str = "", opts: Sequence[str] = (), *, imports: Sequence[str] = ()
) -> CfgNode:
    """Return detectron2's defaults and ours, with a YAML file and overrides merged in.

    The data sets of DATASETS.COCO_FORMAT are registered.

    YAML tags are refused, in the file and in its ``_BASE_`` files: a tag such as
    ``!!python/object/apply:eval`` (detectron2's own Base-RetinaNet.yaml holds one) runs code.

    Args:
        config_file: path of a YAML file; "" for the defaults alone.
        opts: KEY VALUE pairs, one after the other.
        imports: modules to import before anything else, on sys.path or in the current folder. They
            may register data sets and components.

    Returns:
        a config that is not frozen.

    Raises:
        FileNotFoundError: if the file or a base of it does not exist.
        ValueError: for a tag, other bad YAML, an unknown key (close keys are named), a value of
            the wrong type, or a module that cannot be imported. The message is one line.
    """
    if imports and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a script's own folder is there, the current one is not
    for module in imports:
        try:
            importlib.import_module(module)
        except Exception as error:  # it is somebody else's code
            said = f"{type(error).__name__}: {_one_line(error)}"
            raise ValueError(f"--import {module}: {said}") from error
    cfg = get_cfg()
    add_rethinking_bn_config(cfg)
    if config_file:
        if not PathManager.isfile(config_file):
            raise FileNotFoundError(f"config file {config_file!r} does not exist")
        _merge_file(cfg, config_file)
    if len(opts) % 2:
        raise ValueError(f"overrides must be KEY VALUE pairs, but got {' '.join(opts)!r}")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        if key not in _keys(cfg):
            raise ValueError(_unknown_key(cfg, key))
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, ValueError) as error:
            raise ValueError(f"{key} {value}: {_one_line(error)}") from error
    register_coco_format(cfg)
    return cfg


def scale_to_ranks(cfg: CfgNode, ranks: int) -> CfgNode:
    """Return the config as detectron2's trainer scales it: SOLVER.REFERENCE_WORLD_SIZE.

    Raises:
        ValueError: where its images cannot be divided among the processes that it was made for.
    """
    try:
        return DefaultTrainer.auto_scale_workers(cfg, ranks)
    except AssertionError as error:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} cannot be divided by "
            f"SOLVER.REFERENCE_WORLD_SIZE {cfg.SOLVER.REFERENCE_WORLD_SIZE}"
        ) from error


def use_available_device(cfg: CfgNode) -> bool:
    """Set ``MODEL.DEVICE`` to the CPU if it is CUDA without a GPU; return whether that is so."""
    falls_back = cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available()
    if falls_back:
        cfg.MODEL.DEVICE = "cpu"
    return falls_back


def _merge_file(cfg: CfgNode, config_file: str) -> None:
    try:
        cfg.merge_from_file(config_file, allow_unsafe=False)
    except FileNotFoundError as error:
        said = f"{config_file}: its _BASE_ {error.filename!r} does not exist"
        raise FileNotFoundError(said) from error
    except yaml.constructor.ConstructorError as error:
        where = error.problem_mark
        place, key = config_file, ""
        if where:
            place, key = f"{where.name}, line {where.line + 1}", _key_at(where)
        raise ValueError(
            f"{place}: {error.problem}; YAML tags are not loaded because they can execute code: "
            f"write the value itself{key}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{config_file}: its _BASE_ files lead back to themselves") from error
    except KeyError as error:
        unknown = str(error.args[0]).rpartition(" ")[2]
        raise ValueError(f"{config_file}: {_unknown_key(cfg, unknown)}") from error
    except (AttributeError, TypeError) as error:  # an empty file, a list, a bare word
        raise ValueError(f"{config_file}: not a mapping of config keys to values") from error
    except (yaml.YAMLError, AssertionError, ValueError) as error:
        raise ValueError(f"{config_file}: {_one_line(error)}") from error


def _key_at(where: yaml.Mark) -> str:
    """Name the key whose value begins at a place in a file, and what the known one means."""
    with PathManager.open(where.name) as file:
        node, path = yaml.compose(file, yaml.SafeLoader), []  # nodes, of which nothing is made
    while isinstance(node, yaml.MappingNode):
        # the last key that begins before the place
        key, node = [pair for pair in node.value if pair[0].start_mark.index <= where.index][-1]
        path.append(str(key.value))
    key = ".".join(path)
    # detectron2's Base-RetinaNet.yaml
    sizes = [[round(x * 2 ** (i / 3), 1) for i in range(3)] for x in (32, 64, 128, 256, 512)]
    known = f", such as RetinaNet's {sizes}" if key == "MODEL.ANCHOR_GENERATOR.SIZES" else ""
    return f" under {key}{known}"


def _unknown_key(cfg: CfgNode, key: str) -> str:
    close = get_close_matches(key, list(_keys(cfg)), n=3, cutoff=0.6)
    return f"unknown config key {key!r}" + (f"; close keys: {', '.join(close)}" if close else "")


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in cfg.items():
        yield prefix + name
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")


def _one_line(error: BaseException) -> str:
    return textwrap.shorten(str(error), 300, placeholder=" ...")  # joins lines, too
