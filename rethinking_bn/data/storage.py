"""The shapes data sets on disk: written on first use, in any number of processes, and read.

    $DETECTRON2_DATASETS/shapes/v1/train/annotations.json    COCO's instance format
                                         images/000001.png   RGB; the number is the image's id
    $DETECTRON2_DATASETS/shapes/v1/val_jpeg/...              a corrupted twin: the same annotations

A data set is written to a hidden folder beside its place and renamed when complete, so a folder
of the final name is always whole. Processes that start together each write their own (equal) copy
and the first to rename wins; there is no lock to be left behind.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from rethinking_bn.data import shapes
from rethinking_bn.data.corruptions import CORRUPTIONS, corrupt
from rethinking_bn.files import replace

TWIN_SEVERITY = 3  # of 1 to 5, in all corrupted twins
ANNOTATIONS = "annotations.json"
# Name of every data set -> (split, corruption or "").
_PARTS = {
    f"shapes_{split}{'_' * bool(corruption)}{corruption}": (split, corruption)
    for split in shapes.SPLITS
    for corruption in ("", *CORRUPTIONS)
}
SHAPES_DATASETS = tuple(_PARTS)
_BAR: Any = {"disable": None, "leave": False}  # on a terminal, nothing in a log


def datasets_root() -> Path:
    """Return the folder of all data sets: ``$DETECTRON2_DATASETS``, or ``datasets`` here."""
    return Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def ensure_shapes(
    name: str, *, root: str | os.PathLike[str] | None = None, num_images: int | None = None
) -> Path:
    """Return the folder (``annotations.json``, ``images/``) of a shapes data set.

    It is generated, in seconds, if it is not there.

    Args:
        name: one of :data:`SHAPES_DATASETS`: ``shapes_train`` or ``shapes_val``, by itself or
            followed by ``_contrast``, ``_gaussian_noise`` or ``_jpeg``.
        root: in place of :func:`datasets_root`.
        num_images: for a data set of another length in a folder of its own; the images are the
            first ones of the longer data set. None: :data:`~.shapes.SPLITS`.

    Raises:
        ValueError: for an unknown name or a non-positive number of images.
        FileExistsError: if something else stands in the data set's place.
    """
    if name not in _PARTS:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(SHAPES_DATASETS)}")
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images must be positive, got {num_images}")
    split, corruption = _PARTS[name]
    folder = Path(datasets_root() if root is None else root, "shapes", f"v{shapes.VERSION}")
    folder /= name.removeprefix("shapes_") + (f"_first{num_images}" if num_images else "")
    if (folder / ANNOTATIONS).is_file():
        return folder

    def make(aside: Path) -> None:
        (aside / "images").mkdir(parents=True)
        if corruption:
            clean = ensure_shapes(f"shapes_{split}", root=root, num_images=num_images)
            _write_twin(clean, aside, split, corruption)
        else:
            _write_split(aside, split, num_images or shapes.SPLITS[split])

    try:
        replace(folder, make)
    except OSError as error:
        if not folder.exists():
            raise
        if not (folder / ANNOTATIONS).is_file():
            raise FileExistsError(
                f"{folder} is in the way: it holds no {ANNOTATIONS}, so it is no data set of "
                "ours; remove it, or set DETECTRON2_DATASETS to another place"
            ) from error
    return folder


def _write_split(folder: Path, split: str, count: int) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in tqdm(range(count), f"generating shapes_{split}", **_BAR):
        pixels, objects = shapes.draw_sample(split, index)
        image = {"id": index + 1, "file_name": f"{index + 1:06d}.png"}
        images.append(image | {"height": pixels.shape[0], "width": pixels.shape[1]})
        for shape in objects:
            x0, y0, x1, y1 = shape.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": shape.label + 1,
                    "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
                    "area": round(shape.area, 2),
                    "segmentation": [shape.polygon.ravel().tolist()],
                    "iscrowd": 0,
                }
            )
        _save(folder / "images" / image["file_name"], pixels)
    content = {
        "info": {"description": f"shapes_{split}", "version": str(shapes.VERSION)},
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(shapes.CLASSES)],
        "images": images,
        "annotations": annotations,
    }
    (folder / ANNOTATIONS).write_text(json.dumps(content, separators=(",", ":")))


def _write_twin(clean: Path, folder: Path, split: str, corruption: str) -> None:
    paths = sorted((clean / "images").iterdir())
    for path in tqdm(paths, f"generating shapes_{split}_{corruption}", **_BAR):
        seed = [shapes.SEED, *map(zlib.crc32, (split.encode(), path.stem.encode()))]
        clean_pixels = np.asarray(Image.open(path))
        pixels = corrupt(clean_pixels, corruption, severity=TWIN_SEVERITY, seed=seed)
        _save(folder / "images" / path.name, pixels)
    shutil.copyfile(clean / ANNOTATIONS, folder / ANNOTATIONS)


def _save(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Save losslessly: corrupted pixels must come back as they are. Quick over small."""
    Image.fromarray(pixels).save(path, compress_level=1)


class ShapesDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """The shapes as pairs (image, target) in the form that torchvision's detectors take.

    An image is (3, H, W) uint8 in RGB (divide by 255 for torchvision). A target holds ``boxes``
    (n, 4) float32 as (x0, y0, x1, y1), ``labels`` (n,) int64, ``area`` (n,) float32, ``iscrowd``
    (n,) int64 zeros, ``image_id`` (1,) int64 and, if asked for, ``masks`` (n, H, W) uint8.

    Args:
        name: as in :func:`ensure_shapes`, whose root and num_images are ``place``.
        masks: whether targets hold masks.
        first_label: the label of the first class: 0, or 1 where 0 means background (torchvision's
            Mask R-CNN). category_id in the JSON starts at 1.
        in_memory: keep every image (130 kB) once it was read.
    """

    def __init__(
        self,
        name: str,
        *,
        masks: bool = False,
        first_label: int = 0,
        in_memory: bool = False,
        **place: Any,
    ) -> None:
        self.folder = ensure_shapes(name, **place)
        self.json_file = self.folder / ANNOTATIONS  # for pycocotools
        self.masks, self.first_label, self.in_memory = masks, first_label, in_memory
        content = json.loads(self.json_file.read_text())
        self._records: list[dict[str, Any]] = content["images"]
        self._objects: dict[int, list[dict[str, Any]]] = {r["id"]: [] for r in self._records}
        for annotation in content["annotations"]:
            self._objects[annotation["image_id"]].append(annotation)
        self._images: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        record = self._records[index]
        objects = self._objects[record["id"]]
        boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float64).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [o["category_id"] - 1 + self.first_label for o in objects]
        target = {
            "boxes": boxes.float(),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "area": torch.tensor([o["area"] for o in objects], dtype=torch.float32),
            "iscrowd": torch.zeros(len(objects), dtype=torch.int64),
            "image_id": torch.tensor([record["id"]]),
        }
        if self.masks:
            polygons = [o["segmentation"][0] for o in objects]
            runs = coco_mask.frPyObjects(polygons, record["height"], record["width"])
            masks = np.ascontiguousarray(coco_mask.decode(runs).transpose(2, 0, 1))
            target["masks"] = torch.from_numpy(masks)
        image = self._images.get(index)
        if image is None:
            with Image.open(self.folder / "images" / record["file_name"]) as file:
                image = torch.from_numpy(np.asarray(file).transpose(2, 0, 1).copy())
            if self.in_memory:
                self._images[index] = image
        return image.clone(), target
