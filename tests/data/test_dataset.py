"""Reading without detectron2: records and the torch data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from rethinking_bn.data import ShapesDataset
from rethinking_bn.data.shapes import draw_sample

COUNT = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("datasets")


@pytest.mark.parametrize("in_memory", [False, True])
def test_targets(root: Path, in_memory: bool) -> None:
    dataset = ShapesDataset(
        "shapes_val", root=root, num_images=COUNT, masks=True, first_label=1, in_memory=in_memory
    )
    coco = COCO(str(dataset.json_file))
    assert len(dataset) == COUNT
    for index in [*range(COUNT), 0]:
        image, target = dataset[index]
        drawn, objects = draw_sample("val", index)
        assert image.dtype == torch.uint8
        np.testing.assert_array_equal(image.permute(1, 2, 0), drawn)
        np.testing.assert_allclose(target["boxes"], [shape.box for shape in objects], rtol=1e-6)
        assert target["labels"].tolist() == [shape.label + 1 for shape in objects]
        np.testing.assert_allclose(target["area"], [shape.area for shape in objects], atol=0.01)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=int(target["image_id"])))
        assert target["boxes"].dtype == target["area"].dtype == torch.float32
        assert target["labels"].dtype == torch.int64
        assert target["iscrowd"].tolist() == [0] * len(annotations)
        masks = torch.from_numpy(np.stack([coco.annToMask(a) for a in annotations]))
        assert torch.equal(target["masks"], masks)
        # What the caller does to its sample stays with the caller.
        image.zero_(), target["boxes"].zero_(), target["area"].zero_(), target["labels"].zero_()


def test_image_without_objects(root: Path) -> None:
    """Not drawn today, but a torchvision detector needs (0, 4) boxes, not (0,)."""
    path = ShapesDataset("shapes_val", root=root, num_images=2).json_file
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 1]
    path.write_text(json.dumps(content))
    dataset = ShapesDataset("shapes_val", root=root, num_images=2)
    first, target = dataset[0][1], dataset[1][1]
    assert first["labels"].tolist() == [shape.label for shape in draw_sample("val", 0)[1]]
    assert "masks" not in first
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
