"""The catalogs of detectron2: generated on demand, in whatever order they are asked."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from torch import nn

from rethinking_bn.data import CLASSES, SHAPES_DATASETS, ShapesDataset, shapes
from rethinking_bn.data.register import ShapesMetadata, register_shapes

COUNT = 6


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    register_shapes()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setitem(shapes.SPLITS, "train", COUNT)
    monkeypatch.setitem(shapes.SPLITS, "val", COUNT)
    return tmp_path


def test_registration_generates_nothing_and_may_be_repeated(root: Path) -> None:
    before = [DatasetCatalog[name] for name in SHAPES_DATASETS]
    register_shapes()
    assert [DatasetCatalog[name] for name in SHAPES_DATASETS] == before
    for name in SHAPES_DATASETS:
        metadata = MetadataCatalog.get(name)
        assert metadata.name == name and metadata.evaluator_type == "coco"
        assert metadata.thing_classes == list(CLASSES)
    assert os.listdir(root) == []


@pytest.mark.parametrize("name", ["shapes_train", "shapes_val_contrast"])
def test_records(name: str, root: Path) -> None:
    records = DatasetCatalog.get(name)
    assert len(records) == COUNT
    assert records == DatasetCatalog.get(name)
    dataset = ShapesDataset(name)
    for index, record in enumerate(records):
        image, target = dataset[index]
        assert Path(record["file_name"]).is_relative_to(root)
        assert (record["height"], record["width"]) == tuple(image.shape[1:])
        objects = record["annotations"]
        assert [o["category_id"] for o in objects] == target["labels"].tolist()
        boxes = [BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS) for o in objects]
        np.testing.assert_allclose(boxes, target["boxes"], atol=1e-4)
        assert all(len(o["segmentation"][0]) >= 6 and not o["iscrowd"] for o in objects)


class _Oracle(nn.Module):
    """Predicts the annotations of the images it is given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.targets = [*ShapesDataset(name, masks=True)]

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        outputs = []
        for sample in inputs:
            image, target = self.targets[sample["image_id"] - 1]
            assert torch.equal(sample["image"], image.flip(0))  # detectron2 reads BGR
            instances = Instances(
                (sample["height"], sample["width"]),
                pred_boxes=Boxes(target["boxes"]),
                pred_classes=target["labels"],
                scores=torch.linspace(1, 0.5, len(target["labels"])),
                pred_masks=target["masks"].bool(),
            )
            outputs.append({"instances": instances})
        return outputs


class _Trainer(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)


def test_default_trainer_evaluates_the_truth_as_perfect(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = get_cfg()
    cfg.DATASETS.TEST = ("shapes_val_jpeg",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TEST = 0  # as stored
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    # The model is made by a generation of its own: the test itself starts from nothing.
    with monkeypatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(tmp_path / "model"))
        oracle = _Oracle("shapes_val_jpeg")
    assert not (root / "shapes").exists()
    results = _Trainer.test(cfg, oracle)
    for task in ("bbox", "segm"):
        assert results[task]["AP"] == pytest.approx(100)
        for name in CLASSES:
            assert results[task][f"AP-{name}"] == pytest.approx(100)


def test_names_of_other_projects_are_left_to_them(caplog: pytest.LogCaptureFixture) -> None:
    name = "shapes_val_jpeg"
    saved = DatasetCatalog[name], MetadataCatalog[name]
    try:
        DatasetCatalog.remove(name), MetadataCatalog.remove(name)
        DatasetCatalog.register(name, theirs := lambda: [])
        MetadataCatalog.get(name).thing_classes = ["hexagon"]
        with caplog.at_level(logging.WARNING):
            register_shapes()
        assert "'shapes_val_jpeg' is already registered" in caplog.text
        assert DatasetCatalog[name] is theirs
        assert not isinstance(MetadataCatalog.get(name), ShapesMetadata)
        assert MetadataCatalog.get(name).thing_classes == ["hexagon"]
    finally:
        DatasetCatalog[name], MetadataCatalog[name] = saved
