"""On disk: valid COCO, whole or not at all, the same bytes whoever writes them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image
from pycocotools.coco import COCO

from rethinking_bn.data import CLASSES, datasets_root, ensure_shapes, shapes
from rethinking_bn.data.corruptions import corrupt
from tests.helpers import run_distributed

COUNT = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="module")
def train(root: Path) -> Path:
    return ensure_shapes("shapes_train", root=root, num_images=COUNT)


def _content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _entries(root: Path) -> list[str]:
    """Everything beside the data sets of this version, hidden folders included."""
    return sorted(os.listdir(root / "shapes" / f"v{shapes.VERSION}"))


def test_files(train: Path, root: Path) -> None:
    assert train == root / "shapes" / f"v{shapes.VERSION}" / f"train_first{COUNT}"
    names = [f"{i:06d}.png" for i in range(1, COUNT + 1)]
    assert sorted(os.listdir(train)) == ["annotations.json", "images"]
    assert sorted(os.listdir(train / "images")) == names
    for index, name in enumerate(names):
        drawn, _ = shapes.draw_sample("train", index)
        np.testing.assert_array_equal(np.asarray(Image.open(train / "images" / name)), drawn)


def test_annotations_are_valid_coco(train: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = COCO(str(train / "annotations.json"))
    capsys.readouterr()
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert coco.getCatIds() == [1, 2, 3]
    assert coco.getImgIds() == list(range(1, COUNT + 1))
    assert len(set(coco.getAnnIds())) == len(coco.dataset["annotations"]) > COUNT
    assert 0 not in coco.getAnnIds()  # COCOeval takes a match with annotation 0 for no match
    assert coco.getAnnIds(iscrowd=True) == []
    for image in coco.dataset["images"]:
        stored = Image.open(train / "images" / image["file_name"])
        assert stored.size == (image["width"], image["height"]) and stored.mode == "RGB"


def test_boxes_and_areas_are_those_of_the_polygons_and_masks(train: Path) -> None:
    coco = COCO(str(train / "annotations.json"))
    for annotation in coco.dataset["annotations"]:
        (flat,) = annotation["segmentation"]
        x, y = np.array(flat[0::2]), np.array(flat[1::2])
        box = [x.min(), y.min(), np.ptp(x), np.ptp(y)]
        np.testing.assert_allclose(annotation["bbox"], box, atol=1e-9)
        mask = coco.annToMask(annotation)
        # One row of pixels along the outline may fall on either side.
        assert abs(annotation["area"] - mask.sum()) < 0.6 * (box[2] + box[3])
        rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
        extents = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        corners = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
        np.testing.assert_allclose(extents, corners, atol=1.5)


def test_fewer_images_are_a_prefix(train: Path, root: Path) -> None:
    few = ensure_shapes("shapes_train", root=root, num_images=2)
    short, long = (json.loads((f / "annotations.json").read_text()) for f in (few, train))
    assert short["images"] == long["images"][:2]
    assert short["annotations"] == [a for a in long["annotations"] if a["image_id"] <= 2]
    for name in os.listdir(few / "images"):
        assert (few / "images" / name).read_bytes() == (train / "images" / name).read_bytes()


@pytest.mark.parametrize("corruption", ["contrast", "gaussian_noise", "jpeg"])
def test_twins(corruption: str, train: Path, root: Path, tmp_path: Path) -> None:
    name = f"shapes_train_{corruption}"
    twin = ensure_shapes(name, root=root, num_images=COUNT)
    annotations = (train / "annotations.json").read_bytes()
    assert (twin / "annotations.json").read_bytes() == annotations
    assert sorted(os.listdir(twin / "images")) == sorted(os.listdir(train / "images"))
    seen = []
    for path in sorted((train / "images").iterdir()):
        clean = np.asarray(Image.open(path)).astype(int)
        seen.append(np.asarray(Image.open(twin / "images" / path.name)) - clean)
        if corruption != "gaussian_noise":
            expected = corrupt(np.asarray(Image.open(path)), corruption, severity=3)
            np.testing.assert_array_equal(seen[-1] + clean, expected)
    if corruption == "gaussian_noise":
        inner = [d[np.abs(d) < 255] for d in seen]
        assert all(0.12 < np.std(d) / 255 < 0.19 for d in inner)  # 0.18, less for clipping
        same_shape = [d for d in seen if d.shape == seen[0].shape]
        assert not np.array_equal(same_shape[0], same_shape[1])  # each image has its own noise
    # Asked for alone, it generates the clean images first and comes out the same.
    again = ensure_shapes(name, root=tmp_path, num_images=COUNT)
    assert _content(again) == _content(twin)


def test_root_is_the_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))
    assert datasets_root() == tmp_path / "elsewhere"
    folder = ensure_shapes("shapes_val", num_images=1)
    assert folder.is_relative_to(tmp_path / "elsewhere")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert datasets_root() == Path("datasets")


def test_what_is_there_is_not_drawn_again(train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "draw_sample", None)
    assert ensure_shapes("shapes_train", root=train.parents[2], num_images=COUNT) == train


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'shapes_test'.*shapes_train, .*shapes_val_jpeg"):
        ensure_shapes("shapes_test", root=tmp_path)
    with pytest.raises(ValueError, match="num_images.*0"):
        ensure_shapes("shapes_val", root=tmp_path, num_images=0)
    assert os.listdir(tmp_path) == []


def _generate(rank: int, root: str) -> dict[str, bytes]:
    dist.barrier()
    return _content(ensure_shapes("shapes_val_jpeg", root=root, num_images=10))


def test_processes_starting_together_share_one_whole_data_set(tmp_path: Path) -> None:
    seen = run_distributed(_generate, 3, str(tmp_path))
    alone = _content(ensure_shapes("shapes_val_jpeg", root=tmp_path / "alone", num_images=10))
    assert len(alone) == 11
    assert all(content == alone for content in seen)
    assert _entries(tmp_path) == ["val_first10", "val_jpeg_first10"]


def test_something_else_in_the_way(tmp_path: Path) -> None:
    place = tmp_path / "shapes" / f"v{shapes.VERSION}" / "val_first1"
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="val_first1 is in the way"):
        ensure_shapes("shapes_val", root=tmp_path, num_images=1)
    assert (place / "notes.txt").read_text() == "mine"
    assert _entries(tmp_path) == ["val_first1"]
