"""Write the shapes data sets to disk on first use; everything here may run in many processes.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
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


def datasets_root() -> Path:
    """Return the folder of all data sets: ``$DETECTRON2_DATASETS``, or ``datasets`` here."""
    return Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def ensure_shapes(
    name: str, *, root: str | os.PathLike[str] | None = None, num_images: int | None = None
) -> Path:
    """Return the folder of a shapes data set, generating it (seconds) if it is not there.

    Args:
        name: one of :data:`SHAPES_DATASETS`: ``shapes_train`` or ``shapes_val``, by itself or
            followed by ``_contrast``, ``_gaussian_noise`` or ``_jpeg``.
        root: in place of :func:`datasets_root`.
        num_images: for a data set of another length in a folder of its own; the images are the
            first ones of the longer data set. None: :data:`~.shapes.SPLITS`.

    Returns:
        A folder with ``annotations.json`` and ``images/``.

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
    if corruption:
        clean = ensure_shapes(f"shapes_{split}", root=root, num_images=num_images)
        _write_whole(folder, lambda new: _write_twin(clean, new, split, corruption))
    else:
        count = num_images or shapes.SPLITS[split]
        _write_whole(folder, lambda new: _write_split(new, split, count))
    return folder


def _write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder with ``images/`` in it, aside, before it gets its name."""

    def make(aside: Path) -> None:
        (aside / "images").mkdir(parents=True)
        write(aside)

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


def _write_split(folder: Path, split: str, count: int) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in _progress(range(count), f"generating shapes_{split}"):
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
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(shapes.CLASSES)]
    content = {
        "info": {"description": f"shapes_{split}", "version": str(shapes.VERSION)},
        "categories": categories,
        "images": images,
        "annotations": annotations,
    }
    (folder / ANNOTATIONS).write_text(json.dumps(content, separators=(",", ":")))


def _write_twin(clean: Path, folder: Path, split: str, corruption: str) -> None:
    paths = sorted((clean / "images").iterdir())
    for path in _progress(paths, f"generating shapes_{split}_{corruption}"):
        seed = [shapes.SEED, *map(zlib.crc32, (split.encode(), path.stem.encode()))]
        pixels = corrupt(
            np.asarray(Image.open(path)), corruption, severity=TWIN_SEVERITY, seed=seed
        )
        _save(folder / "images" / path.name, pixels)
    shutil.copyfile(clean / ANNOTATIONS, folder / ANNOTATIONS)


def _progress(items: Any, title: str) -> Iterator[Any]:
    """Show a bar on a terminal, nothing in a log."""
    return iter(tqdm(items, title, disable=None, leave=False))


def _save(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Save losslessly: corrupted pixels must come back as they are. Quick over small."""
    Image.fromarray(pixels).save(path, compress_level=1)
