"""tools/prepare_bccd.py: a folder of BCCD's form, with drawn cells, becomes COCO's format."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

TOOL = str(Path(__file__).parents[2] / "tools" / "prepare_bccd.py")
SPLITS = {"train": ["c"], "val": ["a"], "trainval": ["a", "c"], "test": ["b"]}
CELLS = {  # class, xmin, ymin, xmax, ymax
    "a": [("WBC", 5, 6, 30, 40), ("RBC", 0, 0, 20, 18)],
    "b": [("Platelets", 50, 40, 64, 48)],
    "c": [("RBC", 7, 7, 7, 7), ("RBC", 10, 12, 33, 30)],  # the first is empty, as two of BCCD's are
}
OBJECT = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>"
    "<ymax>{}</ymax></bndbox></object>"
)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    folder = tmp_path / "checkout" / "BCCD"
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    for split, names in SPLITS.items():
        (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(names) + "\n")
    for name, cells in CELLS.items():
        image = Image.new("RGB", (64, 48), "pink")
        for _, *box in cells:
            ImageDraw.Draw(image).ellipse(box, fill="red")
        image.save(folder / f"JPEGImages/{name}.jpg")
        objects = "".join(OBJECT.format(*cell) for cell in cells)
        (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    return folder.parent


def run(folder: Path) -> int:
    status: int = runpy.run_path(TOOL, run_name="prepare_bccd")["main"]([str(folder)])
    return status


def fails_with(folder: Path, capsys: Any, said: str) -> None:
    assert run(folder) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"prepare_bccd.py: error: .*{said}", line)


def test_both_splits_and_their_images(checkout: Path, tmp_path: Path, capsys: Any) -> None:
    for _ in range(2):  # a second time changes nothing
        assert run(checkout) == 0
        said = capsys.readouterr().out
    assert "c.xml: object 1 is left out: its box [7.0, 7.0, 7.0, 7.0] is empty" in said
    assert "train.json: 2 images, 3 cells" in said and "test.json: 1 images, 1 cells" in said
    made = tmp_path / "data" / "bccd"
    assert sorted(path.name for path in made.iterdir()) == ["images", "test.json", "train.json"]
    train, test = (json.loads((made / f"{split}.json").read_text()) for split in ("train", "test"))
    size = {"width": 64, "height": 48}
    assert train["images"] == [
        {"id": 1, "file_name": "a.jpg", **size},
        {"id": 2, "file_name": "c.jpg", **size},
    ]
    kinds = [{"id": 1, "name": "RBC"}, {"id": 2, "name": "WBC"}, {"id": 3, "name": "Platelets"}]
    assert train["categories"] == test["categories"] == kinds
    rest = {"iscrowd": 0, "image_id": 1}
    assert train["annotations"] == [
        {"id": 1, "category_id": 2, "bbox": [5, 6, 25, 34], "area": 850, **rest},
        {"id": 2, "category_id": 1, "bbox": [0, 0, 20, 18], "area": 360, **rest},
        {"id": 3, "category_id": 1, "bbox": [10, 12, 23, 18], "area": 414, **rest, "image_id": 2},
    ]
    assert test["annotations"] == [
        {"id": 1, "category_id": 3, "bbox": [50, 40, 14, 8], "area": 112, **rest}
    ]
    for name in CELLS:
        copied = (made / f"images/{name}.jpg").read_bytes()
        assert copied == (checkout / f"BCCD/JPEGImages/{name}.jpg").read_bytes()


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (("RBC", 5, 5, 65, 20), r"box \[5.0, 5.0, 65.0, 20.0\], not inside 64 x 48"),
        (("RBC", 20, 5, 10, 20), r"not inside"),
        (("RBC", -1, 5, 10, 20), r"not inside"),
        (("RBC", "x", 5, 10, 20), "'x'.*no numbers"),
        (("cell", 1, 5, 10, 20), "class 'cell', not one of RBC, WBC, Platelets"),
    ],
)
def test_bad_boxes_are_one_line(
    checkout: Path, tmp_path: Path, capsys: Any, cell: tuple[Any, ...], said: str
) -> None:
    objects = OBJECT.format("RBC", 1, 1, 9, 9) + OBJECT.format(*cell)
    (checkout / "BCCD/Annotations/b.xml").write_text(f"<annotation>{objects}</annotation>")
    fails_with(checkout, capsys, rf"b\.xml: object 2 .*{said}")
    assert not (tmp_path / "data").exists()


def test_files_that_are_not_there_or_broken(checkout: Path, tmp_path: Path, capsys: Any) -> None:
    fails_with(checkout / "BCCD", capsys, "BCCD is no checkout of BCCD_Dataset")
    (checkout / "BCCD/Annotations/b.xml").write_text("<annotation>")
    fails_with(checkout, capsys, r"b\.xml: no element found")
    (checkout / "BCCD/JPEGImages/a.jpg").unlink()
    fails_with(checkout, capsys, r"No such file.*a\.jpg")
    assert not (tmp_path / "data").exists()
