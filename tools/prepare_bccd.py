#!/usr/bin/env python3
"""Turn a checkout of BCCD, 364 microscope images of blood cells, into data for configs/bccd.

    git clone https://github.com/Shenggan/BCCD_Dataset
    python tools/prepare_bccd.py BCCD_Dataset

Writes $DETECTRON2_DATASETS/bccd/{train,test}.json (COCO's format; the split "trainval" trains) and
copies the images to bccd/images there. Boxes without an area are left out, with a line each. Needs
no detectron2.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image

# detectron2, where it is installed, uses what recent versions of torch deprecate
warnings.filterwarnings("ignore", category=FutureWarning, module="torch|detectron2|fvcore")
warnings.filterwarnings("ignore", message="pkg_resources")

from rethinking_bn.data import datasets_root  # noqa: E402
from rethinking_bn.files import probe_folder, replace, write_json  # noqa: E402

CLASSES = ("RBC", "WBC", "Platelets")  # red and white blood cells; category ids from 1
SPLITS = {"train": "trainval", "test": "test"}  # of ours: of the checkout

Content = dict[str, list[dict[str, Any]]]


def read_split(folder: Path, split: str) -> Content:
    """Return a split in COCO's format.

    Args:
        folder: has ImageSets, Annotations and JPEGImages.
        split: of the checkout.

    Raises:
        OSError: for a file that cannot be read.
        ValueError: naming file and box, for what does not fit.
    """
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    content: Content = {"images": [], "annotations": [], "categories": categories}
    names = (folder / "ImageSets/Main" / f"{split}.txt").read_text(encoding="utf-8").split()
    for image_id, name in enumerate(names, 1):
        with Image.open(folder / "JPEGImages" / f"{name}.jpg") as image:
            width, height = image.size
        size = {"width": width, "height": height}
        content["images"].append({"id": image_id, "file_name": f"{name}.jpg", **size})
        path = folder / "Annotations" / f"{name}.xml"
        for category, (x0, y0, x1, y1) in read_objects(path, width, height):
            ids = {"id": len(content["annotations"]) + 1, "image_id": image_id}
            area = (x1 - x0) * (y1 - y0)
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": area, "iscrowd": 0}
            content["annotations"].append({**ids, "category_id": category, **box})
    return content


def read_objects(path: Path, width: int, height: int) -> list[tuple[int, list[float]]]:
    """Return the category id and the box (x0, y0, x1, y1) of each object in an XML file."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: {error}") from error
    found = []
    for number, node in enumerate(root.iter("object"), 1):
        place = f"{path}: object {number}"
        name = node.findtext("name", "")
        if name not in CLASSES:
            raise ValueError(f"{place} is of class {name!r}, not one of {', '.join(CLASSES)}")
        texts = [node.findtext(f"bndbox/{key}", "") for key in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x0, y0, x1, y1 = box = [float(text) for text in texts]
        except ValueError as error:
            raise ValueError(f"{place} has the box {texts}, which are no numbers") from error
        if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
            raise ValueError(f"{place} has the box {box}, not inside {width} x {height} pixels")
        if x0 == x1 or y0 == y1:
            print(f"{place} is left out: its box {box} is empty")
        else:
            found.append((CLASSES.index(name) + 1, box))
    return found


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the checkout")
    folder, target = parser.parse_args(argv).folder / "BCCD", datasets_root() / "bccd"
    try:
        if not (folder / "ImageSets/Main").is_dir():
            raise ValueError(
                f"{folder.parent} is no checkout of BCCD_Dataset: no {folder}/ImageSets"
            )
        contents = {split: read_split(folder, source) for split, source in SPLITS.items()}
        probe_folder(target / "images", "$DETECTRON2_DATASETS/bccd/images")
        for split, content in contents.items():
            for image in content["images"]:
                name = image["file_name"]
                data = (folder / "JPEGImages" / name).read_bytes()
                replace(target / "images" / name, partial(Path.write_bytes, data=data))
            write_json(target / f"{split}.json", content)
            counts = f"{len(content['images'])} images, {len(content['annotations'])} cells"
            print(f"{target / split}.json: {counts}")
    except (OSError, ValueError) as error:
        print(f"prepare_bccd.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
