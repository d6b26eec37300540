"""Register the shapes data sets with detectron2; they are generated when first used."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from rethinking_bn._detectron2 import require_detectron2

require_detectron2("rethinking_bn.data.register")

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog  # noqa: E402
from detectron2.data.datasets import load_coco_json  # noqa: E402

from rethinking_bn.data.shapes import CLASSES  # noqa: E402
from rethinking_bn.data.storage import ANNOTATIONS, SHAPES_DATASETS, ensure_shapes  # noqa: E402

_CATEGORY_IDS = {i + 1: i for i in range(len(CLASSES))}  # of the JSON -> contiguous, from 0


class ShapesMetadata(Metadata):
    """Metadata whose paths generate the data set when they are asked for.

    COCOEvaluator opens ``json_file`` in its constructor, before any loader has asked for the
    data. The paths follow ``$DETECTRON2_DATASETS`` at that moment.
    """

    @property
    def json_file(self) -> str:
        """Path of the COCO annotation file."""
        return str(ensure_shapes(self.name) / ANNOTATIONS)

    @property
    def image_root(self) -> str:
        """Path of the folder of images."""
        return str(ensure_shapes(self.name) / "images")


def register_shapes() -> None:
    """Register :data:`~.storage.SHAPES_DATASETS`; may be called again, generates nothing.

    A name that another project has registered already is left to it, with a warning.
    """
    for name in SHAPES_DATASETS:
        if isinstance(MetadataCatalog.get(name), ShapesMetadata):
            continue
        if name in DatasetCatalog:
            logging.getLogger(__name__).warning(
                "data set %r is already registered by other code and left as it is; "
                "the generated shapes are not available under this name",
                name,
            )
            continue
        DatasetCatalog.register(name, partial(_load, name))
        MetadataCatalog[name] = ShapesMetadata(
            name=name,
            evaluator_type="coco",
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id=dict(_CATEGORY_IDS),
        )


def _load(name: str) -> list[dict[str, Any]]:
    """Return the data set in detectron2's format (boxes, polygons)."""
    folder = ensure_shapes(name)
    return load_coco_json(str(folder / ANNOTATIONS), str(folder / "images"), name)
