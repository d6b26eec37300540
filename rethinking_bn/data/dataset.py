"""Read the shapes data sets with torch alone; detectron2 users get them from its catalog."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from rethinking_bn.data.storage import ANNOTATIONS, ensure_shapes


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
        self.folder = ensure_shapes(name, root=root, num_images=num_images)
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
        return self._image(record), target

    def _image(self, record: dict[str, Any]) -> Tensor:
        """Return a tensor of the caller's own, whether or not the image is kept."""
        image = self._images.get(record["id"])
        if image is None:
            with Image.open(self.folder / "images" / record["file_name"]) as file:
                image = torch.from_numpy(np.asarray(file).transpose(2, 0, 1).copy())
            if not self.in_memory:
                return image
            self._images[record["id"]] = image
        return image.clone()
