"""Read the shapes data sets with torch alone; detectron2 users get them from its catalog."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as coco_mask
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from rethinking_bn.data.storage import ANNOTATIONS, ensure_shapes


class ShapesRecord(NamedTuple):
    """One image's file and annotations; n objects, coordinates in pixels."""

    image_id: int  # the id in annotations.json
    file_name: Path
    height: int
    width: int
    boxes: NDArray[np.float32]  # (n, 4) as (x0, y0, x1, y1)
    labels: NDArray[np.int64]  # (n,) index into shapes.CLASSES; category_id in the JSON is 1 more
    areas: NDArray[np.float32]  # (n,) of the polygons
    polygons: list[list[float]]  # n flat lists x, y, x, y, ...

    def read_image(self) -> NDArray[np.uint8]:
        """Return the image as (H, W, 3) uint8 in RGB."""
        with Image.open(self.file_name) as image:
            return np.asarray(image)


def load_shapes(
    name: str, *, root: str | os.PathLike[str] | None = None, num_images: int | None = None
) -> list[ShapesRecord]:
    """Return the records of a shapes data set, in order of image id; generate it if need be.

    Arguments and errors are those of :func:`~.storage.ensure_shapes`.
    """
    folder = ensure_shapes(name, root=root, num_images=num_images)
    content = json.loads((folder / ANNOTATIONS).read_text())
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    records = []
    for image in content["images"]:
        found = objects[image["id"]]
        boxes = np.array([a["bbox"] for a in found], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        records.append(
            ShapesRecord(
                image_id=image["id"],
                file_name=folder / "images" / image["file_name"],
                height=image["height"],
                width=image["width"],
                boxes=boxes.astype(np.float32),
                labels=np.array([a["category_id"] - 1 for a in found], dtype=np.int64),
                areas=np.array([a["area"] for a in found], dtype=np.float32),
                polygons=[a["segmentation"][0] for a in found],
            )
        )
    return records


class ShapesDataset(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """The shapes as pairs (image, target) in the form that torchvision's detectors take.

    An image is (3, H, W) uint8 in RGB (divide by 255 for torchvision). A target holds ``boxes``
    (n, 4) float32 as (x0, y0, x1, y1), ``labels`` (n,) int64, ``area`` (n,) float32, ``iscrowd``
    (n,) int64 zeros, ``image_id`` (1,) int64 and, if asked for, ``masks`` (n, H, W) uint8.

    Args:
        name, root, num_images: as in :func:`~.storage.ensure_shapes`.
        masks: whether targets hold masks.
        first_label: the label of the first class: 0, or 1 where 0 means background (torchvision's
            Mask R-CNN). category_id in the JSON starts at 1.
        in_memory: keep every image (130 kB) once it was read.
    """

    def __init__(
        self,
        name: str,
        *,
        root: str | os.PathLike[str] | None = None,
        num_images: int | None = None,
        masks: bool = False,
        first_label: int = 0,
        in_memory: bool = False,
    ) -> None:
        self.records = load_shapes(name, root=root, num_images=num_images)
        self.json_file = self.records[0].file_name.parents[1] / ANNOTATIONS  # for pycocotools
        self.masks = masks
        self.first_label = first_label
        self._images: dict[int, Tensor] | None = {} if in_memory else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        record = self.records[index]
        target = {
            "boxes": torch.from_numpy(record.boxes.copy()),
            "labels": torch.from_numpy(record.labels + self.first_label),
            "area": torch.from_numpy(record.areas.copy()),
            "iscrowd": torch.zeros(len(record.labels), dtype=torch.int64),
            "image_id": torch.tensor([record.image_id]),
        }
        if self.masks:
            size = (record.height, record.width)
            runs = coco_mask.frPyObjects([list(p) for p in record.polygons], *size)
            masks = np.ascontiguousarray(coco_mask.decode(runs).transpose(2, 0, 1))
            target["masks"] = torch.from_numpy(masks)
        return self._image(record), target

    def _image(self, record: ShapesRecord) -> Tensor:
        """Return a tensor of the caller's own, whether or not the image is kept."""
        kept = {} if self._images is None else self._images
        if record.image_id not in kept:
            pixels = record.read_image().transpose(2, 0, 1).copy()
            kept[record.image_id] = torch.from_numpy(pixels)
        return kept[record.image_id].clone()
