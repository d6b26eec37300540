"""On disk: valid COCO, whole or not at all, the same bytes whoever writes them; read by torch."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from pycocotools.coco import COCO

from rethinking_bn.data import CLASSES, ShapesDataset, datasets_root, ensure_shapes, shapes
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


def test_files_and_annotations_are_valid_coco(
    train: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train == root / "shapes" / f"v{shapes.VERSION}" / f"train_first{COUNT}"
    names = [f"{i:06d}.png" for i in range(1, COUNT + 1)]
    assert sorted(_content(train)) == ["annotations.json", *(f"images/{name}" for name in names)]
    coco = COCO(str(train / "annotations.json"))
    capsys.readouterr()
    assert [c["name"] for c in coco.loadCats([1, 2, 3])] == list(CLASSES)
    assert coco.getImgIds() == list(range(1, COUNT + 1))
    annotations = coco.dataset["annotations"]
    assert len(set(coco.getAnnIds())) == len(annotations) > COUNT
    assert 0 not in coco.getAnnIds()  # COCOeval takes a match with annotation 0 for no match
    for image, name in zip(coco.dataset["images"], names, strict=True):
        stored = Image.open(train / "images" / name)
        assert stored.size == (image["width"], image["height"]) and stored.mode == "RGB"
        assert image["file_name"] == name
    for annotation in annotations:
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


@pytest.mark.parametrize("in_memory", [False, True])
def test_targets(train: Path, root: Path, in_memory: bool) -> None:
    dataset = ShapesDataset(
        "shapes_train", root=root, num_images=COUNT, masks=True, first_label=1, in_memory=in_memory
    )
    coco = COCO(str(dataset.json_file))
    assert len(dataset) == COUNT
    for index in [*range(COUNT), 0]:
        image, target = dataset[index]
        drawn, objects = shapes.draw_sample("train", index)
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


def test_fewer_images_are_a_prefix_and_one_may_have_no_objects(train: Path, root: Path) -> None:
    few = ensure_shapes("shapes_train", root=root, num_images=2)
    short, long = (json.loads((f / "annotations.json").read_text()) for f in (few, train))
    assert short["images"] == long["images"][:2]
    assert short["annotations"] == [a for a in long["annotations"] if a["image_id"] <= 2]
    for name in os.listdir(few / "images"):
        assert (few / "images" / name).read_bytes() == (train / "images" / name).read_bytes()
    # not drawn today, but a torchvision detector needs (0, 4) boxes, not (0,)
    short["annotations"] = [a for a in short["annotations"] if a["image_id"] == 1]
    (few / "annotations.json").write_text(json.dumps(short))
    dataset = ShapesDataset("shapes_train", root=root, num_images=2)
    first, second = (dataset[index][1] for index in (0, 1))
    assert first["labels"].tolist() == [s.label for s in shapes.draw_sample("train", 0)[1]]
    assert "masks" not in first
    assert second["boxes"].shape == (0, 4) and second["labels"].shape == (0,)


@pytest.mark.parametrize("corruption", ["contrast", "gaussian_noise", "jpeg"])
def test_twins(corruption: str, train: Path, root: Path, tmp_path: Path) -> None:
    name = f"shapes_train_{corruption}"
    twin = ensure_shapes(name, root=root, num_images=COUNT)
    clean, corrupted = _content(train), _content(twin)
    assert corrupted.keys() == clean.keys()
    assert corrupted["annotations.json"] == clean["annotations.json"]
    seen = []
    for path in sorted((train / "images").iterdir()):
        pixels = np.asarray(Image.open(path))
        seen.append(np.asarray(Image.open(twin / "images" / path.name)) - pixels.astype(int))
        if corruption != "gaussian_noise":
            expected = corrupt(pixels, corruption, severity=3)
            np.testing.assert_array_equal(seen[-1] + pixels, expected)
    if corruption == "gaussian_noise":
        inner = [d[np.abs(d) < 255] for d in seen]
        assert all(0.12 < np.std(d) / 255 < 0.19 for d in inner)  # 0.18, less for clipping
        same_shape = [d for d in seen if d.shape == seen[0].shape]
        assert not np.array_equal(same_shape[0], same_shape[1])  # each image has its own noise
    # Asked for alone, it generates the clean images first and comes out the same.
    assert _content(ensure_shapes(name, root=tmp_path, num_images=COUNT)) == corrupted


def test_root_is_the_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))
    assert datasets_root() == tmp_path / "elsewhere"
    folder = ensure_shapes("shapes_val", num_images=1)
    assert folder.is_relative_to(tmp_path / "elsewhere")
    monkeypatch.setattr(shapes, "draw_sample", None)  # what is there is not drawn again
    assert ensure_shapes("shapes_val", num_images=1) == folder
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert datasets_root() == Path("datasets")


def _generate(rank: int, root: str) -> dict[str, bytes]:
    dist.barrier()
    return _content(ensure_shapes("shapes_val_jpeg", root=root, num_images=10))


def test_processes_starting_together_share_one_whole_data_set(tmp_path: Path) -> None:
    seen = run_distributed(_generate, 3, str(tmp_path))
    alone = _content(ensure_shapes("shapes_val_jpeg", root=tmp_path / "alone", num_images=10))
    assert len(alone) == 11
    assert all(content == alone for content in seen)
    assert _entries(tmp_path) == ["val_first10", "val_jpeg_first10"]


def test_what_cannot_be_generated(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'shapes_test'.*shapes_train, .*shapes_val_jpeg"):
        ensure_shapes("shapes_test", root=tmp_path)
    with pytest.raises(ValueError, match="num_images.*0"):
        ensure_shapes("shapes_val", root=tmp_path, num_images=0)
    place = tmp_path / "shapes" / f"v{shapes.VERSION}" / "val_first1"
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="val_first1 is in the way"):
        ensure_shapes("shapes_val", root=tmp_path, num_images=1)
    assert (place / "notes.txt").read_text() == "mine"
    assert _entries(tmp_path) == ["val_first1"]
