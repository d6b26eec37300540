#!/usr/bin/env python3
"""Draw what a detector finds beside the ground truth: one picture per image, and a contact sheet.

    python tools/visualize.py --config-file configs/shapes/retinanet_bn_row1.yaml \\
        MODEL.WEIGHTS output/shapes/retinanet_bn_row1/model_final.pth

``--resume`` takes the last checkpoint in OUTPUT_DIR in place of MODEL.WEIGHTS. The first
``--images`` of DATASETS.TEST go to OUTPUT_DIR/visualize as JPEG, predictions on the left
and ground truth on the right, with all of them on ``sheet.jpg``; ``--beside CONFIG WEIGHTS`` draws
those of another detector between them. Boxes, masks and classes are drawn by detectron2's
Visualizer.
"""

from __future__ import annotations

import argparse
import math
import sys
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
from detectron2.config import CfgNode  # noqa: E402
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog  # noqa: E402
from detectron2.data.detection_utils import read_image  # noqa: E402
from detectron2.structures import Instances  # noqa: E402
from detectron2.utils.visualizer import Visualizer  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from torch import nn  # noqa: E402

from rethinking_bn.data.domains import mark  # noqa: E402
from rethinking_bn.engine import (  # noqa: E402
    Checkpointer,
    Trainer,
    inference_statistics,
    load_config,
)
from rethinking_bn.engine.launch import run, setup  # noqa: E402
from rethinking_bn.files import replace  # noqa: E402

Picture = NDArray[Any]  # (H, W, 3) uint8, BGR as OpenCV has it

_HEIGHT = 320  # pixels of a picture on the sheet
_TITLE = 32  # pixels above a picture


def draw(sample: dict[str, Any], found: dict[str, Instances], metadata: Any) -> Picture:
    """Return predictions beside ground truth for one image of a registered data set.

    Args:
        sample: its entry in the data set.
        found: by the title of each side, on the CPU, in the coordinates of the image.
    """
    image = read_image(sample["file_name"], format="RGB")
    scale = max(1.0, 400 / image.shape[0])  # labels must be readable on small images
    sides = {
        title: Visualizer(image, metadata, scale=scale).draw_instance_predictions(instances)
        for title, instances in found.items()
    }
    sides["ground truth"] = Visualizer(image, metadata, scale=scale).draw_dataset_dict(sample)
    pictures = [titled(title, side.get_image()[:, :, ::-1]) for title, side in sides.items()]
    gap = np.full((pictures[0].shape[0], 8, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (gap, picture)]
    return np.ascontiguousarray(np.concatenate(parts[1:], axis=1))


def titled(title: str, picture: Picture) -> Picture:
    """Return a picture with a line of text above it."""
    head = np.full((_TITLE, picture.shape[1], 3), 255, np.uint8)
    font = cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(head, title, (4, _TITLE - 10), font, 0.8, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([head, picture])


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
    parser.add_argument("--beside", nargs=2, default=(), metavar=("CONFIG", "WEIGHTS"))
    parser.set_defaults(eval_only=True)


def detectors(cfg: CfgNode, args: argparse.Namespace) -> dict[str, tuple[CfgNode, nn.Module]]:
    """Return the detectors to draw, by their titles, the names of their config files.

    Raises:
        ValueError, OSError: for a config or weights of ``--beside`` that do not load.
    """
    weights = (
        args.resume and Checkpointer(nn.Module(), cfg.OUTPUT_DIR).get_checkpoint_file()
    ) or ""
    wanted = [(args.config_file, cfg, weights or cfg.MODEL.WEIGHTS)]
    if args.beside:
        other = load_config(args.beside[0], ["MODEL.DEVICE", cfg.MODEL.DEVICE])
        if not Path(args.beside[1]).is_file():
            raise FileNotFoundError(f"there is no {args.beside[1]}")
        wanted.append((args.beside[0], other, args.beside[1]))
    found: dict[str, tuple[CfgNode, nn.Module]] = {}
    for file, config, path in wanted:
        model = Trainer.build_model(config).eval()
        Checkpointer(model).load(path, checkpointables=[])
        stem = Path(file).stem
        found[stem if stem not in found else f"{stem}, {Path(path).stem}"] = (config, model)
    return found


def main(args: argparse.Namespace) -> None:
    """Draw on one process."""
    cfg = setup(args)
    folder = Path(cfg.OUTPUT_DIR) / "visualize"
    try:
        models = detectors(cfg, args)
    except (ValueError, OSError) as error:
        sys.exit(f"visualize.py: error: --beside: {error}")
    known = ((name, DatasetCatalog.get(name)) for name in cfg.DATASETS.TEST)
    samples = [s for name, of_name in known for s in mark(cfg, name, of_name)][: args.images]
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    pictures = []
    for sample in samples:
        found = {}
        for title, (config, model) in models.items():
            mapped = DatasetMapper(config, is_train=False)(sample)
            with torch.no_grad(), inference_statistics(config, model):
                instances = model([mapped])[0]["instances"].to("cpu")
            found[title] = instances[instances.scores > args.threshold]
        pictures.append(draw(sample, found, metadata))
        name = Path(sample["file_name"]).stem
        save(folder / f"{name}.jpg", pictures[-1])
    save(folder / "sheet.jpg", contact_sheet(pictures))
    print(f"written to {folder}: {len(pictures)} pictures and sheet.jpg")


if __name__ == "__main__":
    assert __doc__ is not None
    run(main, __doc__, add_options=add_options)
