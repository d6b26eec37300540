"""The generated shapes data set and its corrupted twins, read without detectron2."""

from __future__ import annotations

from rethinking_bn.data.corruptions import CORRUPTIONS, corrupt
from rethinking_bn.data.shapes import CLASSES
from rethinking_bn.data.storage import SHAPES_DATASETS, ShapesDataset, datasets_root, ensure_shapes

__all__ = [
    "CLASSES",
    "CORRUPTIONS",
    "SHAPES_DATASETS",
    "ShapesDataset",
    "corrupt",
    "datasets_root",
    "ensure_shapes",
]
