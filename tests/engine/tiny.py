"""A data set and a RetinaNet that train in a second, for tests of the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from rethinking_bn import add_rethinking_bn_config


def write_data(
    folder: str | Path, images: int = 10, categories: list[dict[str, Any]] | None = None
) -> None:
    """Write a COCO data set of noise with bright boxes, wide and high images mixed.

    Args:
        categories: of the JSON; the boxes are of the two with the ids 1 and 2.
    """
    folder = Path(folder)
    rng = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for index in range(images):
        height, width = (48, 64) if index % 3 else (64, 48)
        pixels = rng.integers(0, 100, (height, width, 3), dtype=np.uint8)
        for _ in range(2):
            w, h = rng.integers(8, 30, 2)
            x, y = rng.integers(0, width - w), rng.integers(0, height - h)
            pixels[y : y + h, x : x + w] += 120
            box = [int(v) for v in (x, y, w, h)]
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": index,
                    "category_id": len(boxes) % 2 + 1,
                    "bbox": box,
                    "area": int(w * h),
                    "iscrowd": 0,
                }
            )
        name = f"{index}.png"
        Image.fromarray(pixels).save(folder / name)
        records.append({"id": index, "file_name": name, "height": height, "width": width})
    categories = categories or [{"id": 1, "name": "odd"}, {"id": 2, "name": "even"}]
    content = {"images": records, "annotations": boxes, "categories": categories}
    (folder / "tiny.json").write_text(json.dumps(content))


def register_data(folder: str | Path) -> str:
    """Register the data of :func:`write_data`, written if they are not there; return the name."""
    if not Path(folder, "tiny.json").exists():
        write_data(folder)
    name = f"tiny in {folder}"
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, f"{folder}/tiny.json", str(folder))
    return name


def tiny_config(data: str, output_dir: str | Path, **overrides: Any) -> CfgNode:
    """Return a config for detectron2's RetinaNet with BN everywhere, 6 iterations of 4 images.

    Args:
        data: a registered data set.
        overrides: keys with "__" in place of the dots.
    """
    cfg = get_cfg()
    add_rethinking_bn_config(cfg)
    cfg.SEED = 7
    cfg.OUTPUT_DIR = str(output_dir)
    cfg.DATASETS.TRAIN = (data,)
    cfg.DATASETS.TEST = (data,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN = (48, 64)
    cfg.INPUT.MAX_SIZE_TRAIN = 96
    cfg.INPUT.MIN_SIZE_TEST = 48
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    cfg.MODEL.RETINANET.NUM_CLASSES = 2
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.MODEL.RETINANET.NORM = "BN"
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.MAX_ITER = 6
    cfg.SOLVER.STEPS = (4,)
    cfg.SOLVER.WARMUP_ITERS = 2
    cfg.SOLVER.CHECKPOINT_PERIOD = 3
    cfg.TEST.EVAL_PERIOD = 2
    cfg.TEST.PRECISE_BN.NUM_ITER = 2
    for key, value in overrides.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg
