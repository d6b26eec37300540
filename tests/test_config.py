"""The config keys and the function that finds config files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

from rethinking_bn import add_rethinking_bn_config, get_config_file
from rethinking_bn.config import list_config_files


def flat(cfg: CfgNode, prefix: str = "") -> dict[str, object]:
    """Return every key with dots, and its value."""
    found: dict[str, object] = {}
    for key, value in cfg.items():
        nested = flat(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else None
        found.update({f"{prefix}{key}": value} if nested is None else nested)
    return found


def test_keys_and_defaults() -> None:
    cfg = get_cfg()
    add_rethinking_bn_config(cfg)
    stock = flat(get_cfg())
    everything = flat(cfg)
    assert {key: everything[key] for key in stock} == stock
    assert {key: value for key, value in everything.items() if key not in stock} == {
        "SOLVER.ACCUMULATION_STEPS": 1,
        "SOLVER.AVERAGE.KIND": "",
        "SOLVER.AVERAGE.DECAY": 0.999,
        "SOLVER.AVERAGE.START": 0,
        "SOLVER.AVERAGE.PERIOD": 1,
        "SOLVER.AVERAGE.LR": 0.0,
        "SOLVER.AVERAGE.STATISTICS": "estimate",
        "SOLVER.FREEZE_BN.START": -1,
        "SOLVER.FREEZE_BN.AFFINE": False,
        "SOLVER.TRAIN_ONLY": (),
        "MODEL.DISTILL.TEACHER_CONFIG": "",
        "MODEL.DISTILL.TEACHER_WEIGHTS": "",
        "MODEL.DISTILL.TEMPERATURE": 5.0,
        "MODEL.DISTILL.WEIGHT": 1.0,
        "MODEL.COMPILE_NORMS": False,
        "MODEL.RETINANET.HEAD_NAME": "RetinaNetHead",
        "MODEL.RETINANET.BN.TRAIN_STATS": "",
        "MODEL.RETINANET.BN.POPULATION_STATS": "",
        "MODEL.RETINANET.BN.AFFINE": "",
        "MODEL.ROI_HEADS.NORM_IMAGES": 0,
        "MODEL.BACKBONE.NORM_IMAGES": 0,
        "MODEL.GN.NUM_GROUPS": 32,
        "MODEL.DOMAIN_BN.DATASETS": (),
        "MODEL.DOMAIN_BN.TRAIN_STATS": "domain_specific",
        "MODEL.DOMAIN_BN.POPULATION_STATS": "domain_specific",
        "MODEL.DOMAIN_BN.AFFINE": "domain_specific",
        "MODEL.MABN.SIMULATED_BATCH_SIZE": 32,
        "MODEL.MABN.BATCH_SIZE": 0,
        "MODEL.MABN.MOMENTUM": 0.02,
        "MODEL.MABN.WARMUP_ITERS": 100,
        "MODEL.MABN.R_MAX": 5.0,
        "MODEL.MABN.REQUIRE_WEIGHTS": False,
        "MODEL.ALLOW_MISSING_STATISTICS": False,
        "DATASETS.COCO_FORMAT": (),
        "TEST.DIAGNOSE.PERIOD": 0,
        "TEST.STATISTICS": "population",
        "TEST.PRECISE_BN.DATASETS": (),
        "TEST.PRECISE_BN.IMS_PER_BATCH": 0,
        "TEST.PRECISE_BN.TRANSFORMS": "train",
        "TEST.PRECISE_BN.THAW": False,
        "TEST.PRECISE_BN.NUM_WORKERS": 0,
    }


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


def test_two_configs_share_no_node() -> None:
    first, second = get_cfg(), get_cfg()
    add_rethinking_bn_config(first)
    add_rethinking_bn_config(second)
    first.MODEL.MABN.R_MAX = 3.0
    first.MODEL.RETINANET.BN.AFFINE = "shared"
    assert second.MODEL.MABN.R_MAX == 5.0 and second.MODEL.RETINANET.BN.AFFINE == ""


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
