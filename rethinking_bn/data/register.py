"""Register data sets with detectron2: the generated shapes, and those that a config names."""

from __future__ import annotations

import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

from rethinking_bn._detectron2 import require_detectron2

require_detectron2("rethinking_bn.data.register")

from detectron2.config import CfgNode  # noqa: E402
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog  # noqa: E402
from detectron2.data.datasets import load_coco_json, register_coco_instances  # noqa: E402

from rethinking_bn.data.shapes import CLASSES  # noqa: E402
from rethinking_bn.data.storage import (  # noqa: E402
    ANNOTATIONS,
    SHAPES_DATASETS,
    datasets_root,
    ensure_shapes,
)

logger = logging.getLogger(__name__)


class ShapesMetadata(Metadata):
    """Metadata whose paths generate the data set when they are asked for.

    COCOEvaluator opens ``json_file`` before any loader has asked for the data.
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
            logger.warning("data set %r is already registered by other code, and left to it", name)
            continue
        metadata = ShapesMetadata(
            name=name,
            evaluator_type="coco",
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
        )
        DatasetCatalog.register(name, partial(_load, metadata))
        MetadataCatalog[name] = metadata


def _load(metadata: ShapesMetadata) -> list[dict[str, Any]]:
    """Return the data set in detectron2's format (boxes, polygons)."""
    return load_coco_json(metadata.json_file, metadata.image_root, metadata.name)


def register_coco_format(cfg: CfgNode) -> None:
    """Register the data sets of DATASETS.COCO_FORMAT; a second call changes nothing.

    An entry is (name, annotations.json, folder of images), with paths relative to
    :func:`~.storage.datasets_root`. Nothing is read.

    Raises:
        ValueError: for an entry of another form, or a name that stands for something else already.
    """
    for entry in cfg.DATASETS.get("COCO_FORMAT", ()):  # absent in other projects
        if not isinstance(entry, (list, tuple)) or [type(part) for part in entry] != [str] * 3:
            raise ValueError(
                f"DATASETS.COCO_FORMAT has the entry {entry!r}, which is not (name, "
                "annotations.json, folder of images)"
            )
        name, *places = entry
        json_file, images = (p if "://" in p else str(datasets_root() / p) for p in places)
        before = MetadataCatalog.get(name)
        if before.get("coco_format") == places and before.json_file != json_file:
            DatasetCatalog.remove(name)  # $DETECTRON2_DATASETS has changed
            MetadataCatalog.remove(name)
        if name not in DatasetCatalog:
            register_coco_instances(name, {"coco_format": places}, json_file, images)
        elif before.get("coco_format") != places:
            raise ValueError(
                f"DATASETS.COCO_FORMAT: {name!r} is registered already, for "
                f"{before.get('json_file', 'data of another kind')}; choose another name"
            )


def read_classes(name: str, *, evaluated: bool = False) -> list[str]:
    """Return the classes of a registered data set in COCO's format, from its checked annotations.

    Args:
        name: of the data set.
        evaluated: whether its annotations must do for COCO's evaluation, too.

    Raises:
        ValueError, FileNotFoundError: naming data set and file, for what is no COCO annotation file
            or does not fit together, and for an image that is not there.
    """
    metadata = MetadataCatalog.get(name)
    place = f"data set {name!r}: {metadata.json_file}"
    try:
        content = json.loads(Path(metadata.json_file).read_text(encoding="utf-8"))
        files = [Path(metadata.image_root, image["file_name"]) for image in content["images"]]
        images = {image["id"]: image["height"] * image["width"] for image in content["images"]}
        classes = {kind["id"]: str(kind["name"]) for kind in content["categories"]}
        objects = content["annotations"]
        wrong = [
            o["id"]
            for o in objects
            if not (o["image_id"] in images and o["category_id"] in classes)
            or not (len(o["bbox"]) == 4 and min(o["bbox"][2:]) >= 0)
            or not all(map(math.isfinite, (*o["bbox"], o["area"] if evaluated else 0)))
        ]
        again = len(objects) - len({o["id"] for o in objects})
    except (ValueError, TypeError, KeyError) as error:  # JSON's and Unicode's are ValueErrors
        said = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{place} is no COCO annotation file: {said}") from error
    again += len(files) - len(images)
    if wrong:
        raise ValueError(f"{place}: annotation {wrong[0]} has no valid image, category or box")
    if again or not classes:
        what = f"{again} annotations or images have ids of others" if again else "no categories"
        raise ValueError(f"{place}: {what}")
    if evaluated and any(o["id"] == 0 for o in objects):
        logger.warning("%s: COCO's evaluation never finds annotation 0: number from 1", place)
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{place}: no image {path}")
    return [classes[key] for key in sorted(classes)]
