"""Config files as data: merged with their bases and overrides, never executed."""

from __future__ import annotations

import importlib
import linecache
import os
import sys
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

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

    The data sets of DATASETS.COCO_FORMAT are registered. YAML tags are refused: one such as
    ``!!python/object/apply:eval`` (detectron2's own Base-RetinaNet.yaml holds it) runs code.

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
            said = f"{type(error).__name__}: {one_line(error)}"
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
        if key not in flat(cfg):
            raise ValueError(_unknown_key(cfg, key))
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, ValueError) as error:
            raise ValueError(f"{key} {value}: {one_line(error)}") from error
    register_coco_format(cfg)
    return cfg


def scale_to_ranks(cfg: CfgNode, ranks: int) -> CfgNode:
    """Return the config as detectron2 scales it (SOLVER.REFERENCE_WORLD_SIZE), or a ValueError."""
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


def flat(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Return every key of a config with its dots, and its value; sections are among them."""
    found: dict[str, Any] = {}
    for name, value in cfg.items():
        found[prefix + name] = value
        if isinstance(value, CfgNode):
            found |= flat(value, f"{prefix}{name}.")
    return found


def changed(cfg: CfgNode, key: str, value: Any) -> CfgNode:
    """Return a copy of a config, as frozen as it is, with another value of one key."""
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([key, value])
    if frozen:
        cfg.freeze()
    return cfg


def one_line(error: object) -> str:
    """Return what an error says, shortened, in one line."""
    return textwrap.shorten(str(error), 400, placeholder=" ...")


def _merge_file(cfg: CfgNode, config_file: str) -> None:
    try:
        cfg.merge_from_file(config_file, allow_unsafe=False)
    except FileNotFoundError as error:
        said = f"{config_file}: its _BASE_ {error.filename!r} does not exist"
        raise FileNotFoundError(said) from error
    except yaml.constructor.ConstructorError as error:
        mark = error.problem_mark
        where = config_file
        if mark is not None:
            linecache.checkcache(mark.name)  # the file may have been edited since
            line = one_line(linecache.getline(mark.name, mark.line + 1))
            where = f"{mark.name}, line {mark.line + 1}, {line!r}"
        raise ValueError(
            f"{where}: {error.problem}; "
            "YAML tags are not loaded because they can execute code: write the value itself"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{config_file}: its _BASE_ files lead back to themselves") from error
    except KeyError as error:
        unknown = str(error.args[0]).rpartition(" ")[2]
        raise ValueError(f"{config_file}: {_unknown_key(cfg, unknown)}") from error
    except (AttributeError, TypeError) as error:  # an empty file, a list, a bare word
        raise ValueError(f"{config_file}: not a mapping of config keys to values") from error
    except (yaml.YAMLError, AssertionError, ValueError) as error:
        raise ValueError(f"{config_file}: {one_line(error)}") from error


def _unknown_key(cfg: CfgNode, key: str) -> str:
    close = get_close_matches(key, flat(cfg), n=3, cutoff=0.6)
    return f"unknown config key {key!r}" + (f"; close keys: {', '.join(close)}" if close else "")
