"""The generated shapes data set and its corrupted twins.

Everything exported here works without detectron2; :mod:`.register` makes the data sets known
to it. Objects are circles, squares and triangles of log-uniform size, so that every level of a
feature pyramid gets some. Boxes, masks and areas are those of full shapes, of which at least
70 % is in sight.
"""

from __future__ import annotations

from rethinking_bn.data.corruptions import CORRUPTIONS, corrupt
from rethinking_bn.data.dataset import ShapesDataset, ShapesRecord, load_shapes
from rethinking_bn.data.shapes import CLASSES
from rethinking_bn.data.storage import SHAPES_DATASETS, datasets_root, ensure_shapes

__all__ = [
    "CLASSES",
    "CORRUPTIONS",
    "SHAPES_DATASETS",
    "ShapesDataset",
    "ShapesRecord",
    "corrupt",
    "datasets_root",
    "ensure_shapes",
    "load_shapes",
]
