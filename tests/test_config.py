"""The config keys and the function that finds config files."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

from rethinking_bn import add_rethinking_bn_config, get_config_file
from rethinking_bn.config import list_config_files, our_keys


def flat(cfg: CfgNode, prefix: str = "") -> dict[str, object]:
    """Return every key with dots, and its value."""
    found: dict[str, object] = {}
    for key, value in cfg.items():
        nested = flat(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else None
        found.update({f"{prefix}{key}": value} if nested is None else nested)
    return found


def test_keys_are_added_to_detectron2s_and_each_has_its_comment() -> None:
    cfg, stock = get_cfg(), flat(get_cfg())
    add_rethinking_bn_config(cfg)
    everything, ours = flat(cfg), flat(our_keys())
    assert {key: everything[key] for key in stock} == stock
    assert {key: v for key, v in everything.items() if key not in stock} == ours and len(ours) > 35
    lines = inspect.getsource(our_keys).splitlines()
    keys = {line.split(" = ")[0].strip()[2:]: number for number, line in enumerate(lines)}
    assert ours.keys() <= keys.keys()
    for key in ours:  # up to three keys beside each other may share a comment
        assert any("#" in line for line in lines[keys[key] - 3 : keys[key]]), key


def test_adding_twice_keeps_values() -> None:
    cfg = get_cfg()
    add_rethinking_bn_config(cfg)
    cfg.MODEL.RETINANET.HEAD_NAME = "SharedBNRetinaNetHead"
    cfg.TEST.PRECISE_BN.DATASETS = ("other",)
    cfg.MODEL.MABN.pop("R_MAX")
    before = cfg.clone()
    add_rethinking_bn_config(cfg)
    before.MODEL.MABN.R_MAX = 5.0
    assert cfg == before
    cfg.freeze()
    add_rethinking_bn_config(cfg)  # nothing to add, so nothing to refuse


@pytest.mark.parametrize("name", ["retinanet_bn_row1.yaml", "shapes/retinanet_bn_row1.yaml"])
def test_config_files_are_found_from_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = get_config_file(name)
    assert os.path.isabs(path) and path.endswith(name) and os.path.isfile(path)
    assert name in list_config_files()


@pytest.mark.parametrize("name", ["retinanet_bn_row7.yaml", "retinanet_bn_row1", "../setup.py"])
def test_unknown_config_file_lists_close_names(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        get_config_file(name)
    assert repr(name) in str(caught.value) and "retinanet_bn_row1.yaml" in str(caught.value)
