"""The config keys, and every YAML: safe to load, trains, infers, and says what the paper says."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from rethinking_bn import add_rethinking_bn_config, get_config_file
from rethinking_bn.config import list_config_files, our_keys
from rethinking_bn.engine import load_config
from rethinking_bn.engine.unread_keys import unread_keys
from rethinking_bn.layers import CenConv2d

FILES = [name for name in list_config_files() if not Path(name).name.startswith("Base-")]
PAPER = [name for name in FILES if "/" not in name]
TABLE = [name for name in PAPER if name.startswith("retinanet_") and "mabn" not in name]
TWINS = [("shapes", name) for name in PAPER] + [("bccd", name) for name in TABLE]
SHARED, SEPARATE = "shared", "domain_specific"
BOX, MASK = "MODEL.ROI_BOX_HEAD.", "MODEL.ROI_MASK_HEAD."


def flat(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Return every key with dots, and its value."""
    found: dict[str, Any] = {}
    for key, value in cfg.items():
        nested = flat(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else None
        found.update({f"{prefix}{key}": value} if nested is None else nested)
    return found


def load(name: str) -> CfgNode:
    cfg = get_cfg()
    add_rethinking_bn_config(cfg)
    cfg.merge_from_file(get_config_file(name))
    return cfg


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


def test_files_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("retinanet_bn_row1.yaml", "shapes/retinanet_bn_row1.yaml"):
        path = get_config_file(name)
        assert os.path.isabs(path) and path.endswith(name) and os.path.isfile(path)
    for name in ("retinanet_bn_row7.yaml", "retinanet_bn_row1", "../setup.py"):
        with pytest.raises(ValueError, match=rf"'{name}'.* retinanet_bn_row1.yaml"):
            get_config_file(name)


@pytest.mark.parametrize("name", list_config_files())
def test_files_hold_no_yaml_tags_and_every_key_is_read(name: str) -> None:
    assert "!!" not in Path(get_config_file(name)).read_text(encoding="utf-8")
    assert unread_keys(load_config(get_config_file(name))) == []


def batch(with_masks: bool) -> list[dict[str, Any]]:
    images = []
    for size in (64, 32):
        boxes = torch.tensor([[4.0, 4.0, 30.0, 28.0], [8.0, 2.0, 20.0, 20.0]])
        instances = Instances((size, 64), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([0, 1]))
        if with_masks:
            masks = torch.zeros(2, size, 64, dtype=torch.bool)
            masks[:, 6:18, 9:19] = True
            instances.gt_masks = BitMasks(masks)
        image = torch.randint(0, 255, (3, size, 64)).float()
        images.append({"image": image, "instances": instances})
    return images


# COCO's sizes take seconds each, and every one has a twin of the same layers
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in PAPER else []) for n in FILES]
)
def test_one_training_step_and_one_inference_step(name: str, tmp_path: Path) -> None:
    cfg = load(name)
    if cfg.MODEL.META_ARCHITECTURE == "DistilledRetinaNet":
        cfg.MODEL.DISTILL.TEACHER_WEIGHTS = str(tmp_path / "teacher.pth")
        teacher = build_model(load(cfg.MODEL.DISTILL.TEACHER_CONFIG))
        torch.save({"model": teacher.state_dict()}, cfg.MODEL.DISTILL.TEACHER_WEIGHTS)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "INPUT.MASK_FORMAT", "bitmask"])
    # fewer boxes and rows, so that it is quick; the layers are the config's
    cfg.merge_from_list(["MODEL.RPN.POST_NMS_TOPK_TRAIN", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 10])
    cfg.merge_from_list(["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8])
    model = build_model(cfg)
    domains = {"domain": 0} if cfg.MODEL.DOMAIN_BN.DATASETS else {}
    with EventStorage():
        losses = model.train()([{**item, **domains} for item in batch(cfg.MODEL.MASK_ON)])
        sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    torch.optim.SGD(trained, lr=1e-4).step()
    model.eval()
    with torch.no_grad():
        outputs = model([{"image": item["image"], **domains} for item in batch(False)])
    assert [output["instances"].image_size for output in outputs] == [(64, 64), (32, 64)]


@pytest.mark.parametrize(("data", "name"), TWINS)
def test_each_file_has_a_twin_that_is_about_the_same_thing(data: str, name: str) -> None:
    paper, twin = flat(load(name)), flat(load(f"{data}/{name}"))
    changed = {key for key, value in paper.items() if twin[key] != value}
    kept = {
        key
        for key in paper
        if key.startswith(("MODEL.RETINANET.BN.", "MODEL.ROI_", "MODEL.MABN."))
        or key in ("MODEL.META_ARCHITECTURE", "MODEL.RETINANET.HEAD_NAME", "MODEL.RETINANET.NORM")
        or key in ("TEST.PRECISE_BN.ENABLED", "TEST.PRECISE_BN.DATASETS", "MODEL.MASK_ON")
    }
    sizes = {"MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"}
    sizes |= {BOX + "FC_DIM", BOX + "CONV_DIM", MASK + "CONV_DIM", "MODEL.MABN.WARMUP_ITERS"}
    assert changed & kept <= sizes | {"MODEL.MABN.REQUIRE_WEIGHTS"}  # no twin has weights
    assert twin["DATASETS.TRAIN"] == (f"{data}_train",) and twin["MODEL.WEIGHTS"] == ""
    assert paper["OUTPUT_DIR"] == f"output/{Path(name).stem}"
    assert twin["OUTPUT_DIR"] == f"output/{data}/{Path(name).stem}"


def row(train: str, population: str, affine: str, *, precise: bool) -> dict[str, Any]:
    return {
        "MODEL.RETINANET.HEAD_NAME": "MultiDomainBNRetinaNetHead",
        "MODEL.RETINANET.NORM": "SyncBN",
        "MODEL.RETINANET.BN.TRAIN_STATS": train,
        "MODEL.RETINANET.BN.POPULATION_STATS": population,
        "MODEL.RETINANET.BN.AFFINE": affine,
        **({"TEST.PRECISE_BN.ENABLED": True} if precise else {}),
    }


def heads(norm: str, *, precise: bool = False, shuffle: bool = False, images: int = 0) -> Any:
    return {
        "MODEL.ROI_HEADS.NAME": "NormImagesROIHeads",
        BOX + "NUM_CONV": 4,
        BOX + "NUM_FC": 1,
        BOX + "NAME": "ShuffleBNBoxHead" if shuffle else "NormBoxHead",
        MASK + "NAME": "ShuffleBNMaskHead" if shuffle else "NormMaskHead",
        **({BOX + "NORM": norm, MASK + "NORM": norm} if norm else {}),
        **({"TEST.PRECISE_BN.ENABLED": True} if precise else {}),
        **({"MODEL.ROI_HEADS.NORM_IMAGES": images} if images else {}),
    }


TABLE_5 = {
    "retinanet_bn_row1": row(SHARED, SHARED, SHARED, precise=False),
    "retinanet_bn_row2": row(SHARED, SEPARATE, SHARED, precise=True),
    "retinanet_bn_row3": row(SEPARATE, SHARED, SHARED, precise=False),
    "retinanet_bn_row4": row(SEPARATE, SEPARATE, SHARED, precise=True),
    "retinanet_bn_row5": row(SEPARATE, SHARED, SEPARATE, precise=True),
    "retinanet_bn_row6": row(SEPARATE, SEPARATE, SEPARATE, precise=False),
    "retinanet_gn": {"MODEL.RETINANET.NORM": "GN"},
    "retinanet_no_norm": {},
}
TABLES_3_AND_6 = {
    "mask_rcnn_bn_head": heads("BN", precise=True),
    "mask_rcnn_bn_head_1im": heads("BN", precise=True, images=1),
    "mask_rcnn_bn_head_batch_stats": heads("BatchStatBN"),
    "mask_rcnn_shuffle_bn_head": heads("BN", precise=True, shuffle=True),
    "mask_rcnn_shuffle_bn_head_1im": heads("BN", precise=True, shuffle=True, images=1),
    "mask_rcnn_syncbn_head": heads("SyncBN", precise=True),
    "mask_rcnn_gn_head": heads("GN"),
    "mask_rcnn_no_norm": heads(""),
}
GN = {
    "MODEL.BACKBONE.NAME": "build_gn_resnet_fpn_backbone",
    "MODEL.ROI_HEADS.NAME": "NormImagesROIHeads",
    BOX + "NAME": "NormBoxHead",
    MASK + "NAME": "NormMaskHead",
}
IMAGENET_GN = {"MODEL.WEIGHTS": "detectron2://ImageNetPretrained/FAIR/R-50-GN.pkl"}
RECIPES = {
    **{
        name: (
            "COCO-Detection/retinanet_R_50_FPN_3x.yaml",
            {"MODEL.META_ARCHITECTURE": "ConfigurableHeadRetinaNet", **changed},
        )
        for name, changed in TABLE_5.items()
    },
    **{
        name: ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml", changed)
        for name, changed in TABLES_3_AND_6.items()
    },
    "mask_rcnn_gn": ("Misc/mask_rcnn_R_50_FPN_3x_gn.yaml", {**GN, **IMAGENET_GN}),
    "mask_rcnn_gn_scratch": ("Misc/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml", GN),
}


@pytest.mark.parametrize("name", RECIPES)
def test_differs_from_detectron2s_recipe_in_nothing_else(name: str) -> None:
    baseline, changed = RECIPES[name]
    stock = model_zoo.get_config(baseline)
    add_rethinking_bn_config(stock)
    before, ours = flat(stock), flat(load(f"{name}.yaml"))
    assert {key: value for key, value in ours.items() if before[key] != value} == {
        "OUTPUT_DIR": f"output/{name}",
        **changed,
    }
    # what the paper states of the recipe, whatever detectron2's defaults become
    if name in TABLE_5 or name in TABLES_3_AND_6:
        assert ours["SOLVER.MAX_ITER"] == 270000 and ours["SOLVER.STEPS"] == (210000, 250000)
        assert ours["SOLVER.IMS_PER_BATCH"] == 16
        assert ours["SOLVER.BASE_LR"] == (0.01 if name in TABLE_5 else 0.02)
        assert ours["MODEL.BACKBONE.FREEZE_AT"] == 2 and ours["MODEL.RESNETS.NORM"] == "FrozenBN"
    else:
        assert ours["MODEL.RESNETS.STRIDE_IN_1X1"] is False
        assert ours["MODEL.BACKBONE.FREEZE_AT"] == (0 if "scratch" in name else 2)
    if name in TABLES_3_AND_6:
        assert ours[BOX + "CONV_DIM"] == ours[MASK + "CONV_DIM"] == 256
        assert ours[BOX + "FC_DIM"] == 1024 and ours[MASK + "NUM_CONV"] == 4


@pytest.mark.parametrize(
    "name", ["mask_rcnn_mabn", "mask_rcnn_mabn_scratch", "retinanet_mabn_scratch"]
)
def test_mabn_throughout_is_the_published_recipe(name: str) -> None:
    ours = flat(load(f"{name}.yaml"))
    assert {
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.BASE_LR": 0.01 if "retinanet" in name else 0.02,
        "SOLVER.WEIGHT_DECAY": 1e-4,
        "SOLVER.MAX_ITER": 180000,
        "SOLVER.STEPS": (120000, 160000),
        "SOLVER.WARMUP_ITERS": 500,
        "SOLVER.WARMUP_FACTOR": 1 / 3,
        "INPUT.MIN_SIZE_TRAIN": (800,),
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.WEIGHTS": "",
        "MODEL.MABN.SIMULATED_BATCH_SIZE": 32,
        "MODEL.MABN.MOMENTUM": 0.02,
        "MODEL.MABN.REQUIRE_WEIGHTS": name == "mask_rcnn_mabn",
    }.items() <= ours.items()


@pytest.mark.parametrize("name", ["mask_rcnn_mabn", "retinanet_mabn_scratch"])
def test_mabn_is_where_its_authors_put_it(name: str) -> None:
    cfg = load(f"shapes/{name}.yaml")
    model = build_model(cfg)
    convolutions = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    centred = [name for name, layer in convolutions if type(layer) is CenConv2d]
    left = {name for name, _ in convolutions} - {*centred}
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if cfg.MODEL.MASK_ON:
        assert len(centred) == 53 + 8 + 4 + 4
        left = {module for module in left if not module.startswith("proposal_generator.")}
        assert left == {"roi_heads.mask_head.predictor"}
    else:
        assert len(centred) == 53 + 6 + 8
        top = {"backbone.top_block.p6", "backbone.top_block.p7"}
        assert left == top | {"head.cls_score", "head.bbox_pred"}
