#!/usr/bin/env python3
"""Draw what a detector finds beside the ground truth: one picture per image, and a contact sheet.

    python tools/visualize.py --config-file configs/shapes/retinanet_bn_row1.yaml \\
        MODEL.WEIGHTS output/shapes/retinanet_bn_row1/model_final.pth

``--resume`` takes the last checkpoint in OUTPUT_DIR in place of MODEL.WEIGHTS. The first
``--images`` of DATASETS.TEST go to OUTPUT_DIR/visualize as JPEG, predictions on the left
and ground truth on the right, with all of them on ``sheet.jpg``. Boxes, masks and classes are drawn
by detectron2's Visualizer.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# detectron2 uses what recent versions of torch deprecate: nothing a user of this tool can change
warnings.filterwarnings("ignore", category=FutureWarning, module="torch|detectron2|fvcore")

from rethinking_bn.command_line import at_least_one, require_detectron2  # noqa: E402

if __name__ == "__main__":
    require_detectron2(__doc__ or "")

import rethinking_bn.engine  # noqa: E402, F401, isort: skip  # says so where detectron2 is missing
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog  # noqa: E402
from detectron2.data.detection_utils import read_image  # noqa: E402
from detectron2.structures import Instances  # noqa: E402
from detectron2.utils.visualizer import Visualizer  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from rethinking_bn.data.domains import mark  # noqa: E402
from rethinking_bn.engine import Checkpointer, Trainer, inference_statistics  # noqa: E402
from rethinking_bn.engine.launch import run, setup  # noqa: E402
from rethinking_bn.files import replace  # noqa: E402

Picture = NDArray[Any]  # (H, W, 3) uint8, BGR as OpenCV has it

_HEIGHT = 320  # pixels of a picture on the sheet


def draw(sample: dict[str, Any], found: Instances, metadata: Any) -> Picture:
    """Return predictions beside ground truth for one image of a registered data set.

    Args:
        sample: its entry in the data set.
        found: on the CPU, in the coordinates of the image.
    """
    image = read_image(sample["file_name"], format="RGB")
    scale = max(1.0, 400 / image.shape[0])  # labels must be readable on small images
    sides = (
        Visualizer(image, metadata, scale=scale).draw_instance_predictions(found),
        Visualizer(image, metadata, scale=scale).draw_dataset_dict(sample),
    )
    pictures = [side.get_image()[:, :, ::-1] for side in sides]
    gap = np.full((pictures[0].shape[0], 8, 3), 255, np.uint8)
    return np.ascontiguousarray(np.concatenate([pictures[0], gap, pictures[1]], axis=1))


def contact_sheet(pictures: Sequence[Picture]) -> Picture:
    """Return all pictures, equally high, in as many columns as rows."""
    resized = [cv2.resize(p, (round(p.shape[1] * _HEIGHT / p.shape[0]), _HEIGHT)) for p in pictures]
    columns = max(1, round(math.sqrt(len(resized))))
    width = max(p.shape[1] for p in resized) + 8
    cells = [
        cv2.copyMakeBorder(
            p, 4, 4, 4, width - p.shape[1] - 4, cv2.BORDER_CONSTANT, value=(255, 255, 255)
        )
        for p in resized
    ]
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    return np.concatenate(rows)


def save(path: Path, picture: Picture) -> None:
    """Write a JPEG."""
    encoded = cv2.imencode(".jpg", picture)[1].tobytes()
    replace(path, lambda aside: aside.write_bytes(encoded))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this tool's options; it never trains."""
    parser.add_argument("--images", type=at_least_one, default=9, metavar="N", help="how many")
    parser.add_argument("--threshold", type=float, default=0.3, help="least score to draw")
    parser.set_defaults(eval_only=True)


def main(args: argparse.Namespace) -> None:
    """Draw on one process."""
    cfg = setup(args)
    folder = Path(cfg.OUTPUT_DIR) / "visualize"
    model = Trainer.build_model(cfg).eval()
    Checkpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    known = ((name, DatasetCatalog.get(name)) for name in cfg.DATASETS.TEST)
    samples = [s for name, of_name in known for s in mark(cfg, name, of_name)][: args.images]
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    mapper = DatasetMapper(cfg, is_train=False)
    pictures = []
    for sample in samples:
        with torch.no_grad(), inference_statistics(cfg, model):
            found = model([mapper(sample)])[0]["instances"].to("cpu")
        pictures.append(draw(sample, found[found.scores > args.threshold], metadata))
        name = Path(sample["file_name"]).stem
        save(folder / f"{name}.jpg", pictures[-1])
    save(folder / "sheet.jpg", contact_sheet(pictures))
    print(f"written to {folder}: {len(pictures)} pictures and sheet.jpg")


if __name__ == "__main__":
    assert __doc__ is not None
    run(main, __doc__, add_options=add_options)
