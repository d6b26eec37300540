"""Reading without detectron2: records and the torch data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from rethinking_bn.data import ShapesDataset, load_shapes
from rethinking_bn.data.shapes import draw_sample

COUNT = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("datasets")


def test_records_are_what_was_drawn(root: Path) -> None:
    records = load_shapes("shapes_val", root=root, num_images=COUNT)
    assert [record.image_id for record in records] == [1, 2, 3, 4, 5]
    for index, record in enumerate(records):
        image, objects = draw_sample("val", index)
        np.testing.assert_array_equal(record.read_image(), image)
        assert (record.height, record.width) == image.shape[:2]
        assert record.boxes.dtype == np.float32 and record.labels.dtype == np.int64
        np.testing.assert_allclose(record.boxes, [shape.box for shape in objects], rtol=1e-6)
        assert record.labels.tolist() == [shape.label for shape in objects]
        np.testing.assert_allclose(record.areas, [shape.area for shape in objects], atol=0.01)
        drawn = [shape.polygon.ravel().tolist() for shape in objects]
        assert record.polygons == drawn


@pytest.mark.parametrize("in_memory", [False, True])
def test_targets(root: Path, in_memory: bool) -> None:
    dataset = ShapesDataset(
        "shapes_val", root=root, num_images=COUNT, masks=True, first_label=1, in_memory=in_memory
    )
    coco = COCO(str(dataset.json_file))
    assert len(dataset) == COUNT
    for index in [*range(COUNT), 0]:
        image, target = dataset[index]
        drawn, _ = draw_sample("val", index)
        assert image.dtype == torch.uint8
        np.testing.assert_array_equal(image.permute(1, 2, 0), drawn)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=int(target["image_id"])))
        boxes = torch.tensor([a["bbox"] for a in annotations])
        boxes[:, 2:] += boxes[:, :2]
        assert target["boxes"].dtype == torch.float32
        torch.testing.assert_close(target["boxes"], boxes)
        assert target["labels"].tolist() == [a["category_id"] for a in annotations]
        assert target["iscrowd"].tolist() == [0] * len(annotations)
        masks = torch.from_numpy(np.stack([coco.annToMask(a) for a in annotations]))
        assert torch.equal(target["masks"], masks)
        # What the caller does to its sample stays with the caller.
        image.zero_(), target["boxes"].zero_(), target["area"].zero_(), target["labels"].zero_()


def test_labels_start_at_zero_and_masks_are_optional(root: Path) -> None:
    dataset = ShapesDataset("shapes_val", root=root, num_images=COUNT)
    _, target = dataset[1]
    assert target["labels"].tolist() == dataset.records[1].labels.tolist()
    assert "masks" not in target


def test_image_without_objects(root: Path) -> None:
    """Not drawn today, but a torchvision detector needs (0, 4) boxes, not (0,)."""
    folder = load_shapes("shapes_val", root=root, num_images=2)[0].file_name.parents[1]
    content = json.loads((folder / "annotations.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 1]
    (folder / "annotations.json").write_text(json.dumps(content))
    _, target = ShapesDataset("shapes_val", root=root, num_images=2)[1]
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
