"""Small Mask R-CNN heads and models, and their heads written out in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from torch import Tensor

from rethinking_bn.data.storage import ensure_shapes
from rethinking_bn.modeling import NormBoxHead, NormMaskHead, ShuffleBNBoxHead, ShuffleBNMaskHead
from tests import rois
from tests.engine.tiny import tiny_config
from tests.rois import CHANNELS, SIDE

KINDS = ("box", "mask")
SIZE = (48, 64)
INPUT = ShapeSpec(channels=CHANNELS, height=SIDE, width=SIDE)
BOX, MASK = {"conv_dims": [4, 8], "fc_dims": [6]}, {"conv_dims": [4, 8, 4], "num_classes": 2}
LEVELS = ("p2", "p3", "p4", "p5")


def make_head(kind: str, *, shuffled: bool = False, **overrides: Any) -> Any:
    """Return a "box" or "mask" head with random affines and predictors; float64, training mode."""
    classes = {
        "box": (NormBoxHead, ShuffleBNBoxHead, BOX),
        "mask": (NormMaskHead, ShuffleBNMaskHead, MASK),
    }
    norm, shuffle, arguments = classes[kind]
    options: dict[str, Any] = {**arguments, "conv_norm": "BN", **overrides}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        head = (shuffle if shuffled else norm)(INPUT, **options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in head.named_parameters():
        if parameter.dim() == 1 or name.startswith("predictor"):
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return head.double()


def call(head: Any, x: Tensor) -> Tensor:
    """Return a head's output, the mask head's being its logits."""
    return head.layers(x) if isinstance(head, NormMaskHead) else head(x)


def written_out(head: Any, x: Tensor, groups: Sequence[int]) -> tuple[Tensor, Any]:
    """As ``tests.rois.written_out``, of all layers."""
    x, running = rois.written_out(head, x, groups)
    if isinstance(head, NormMaskHead):
        x = F.relu(F.conv_transpose2d(x, head.deconv.weight, head.deconv.bias, stride=2))
        return F.conv2d(x, head.predictor.weight, head.predictor.bias), running
    x = x.flatten(1) if head.fcs else x
    for layer in head.fcs:
        x = F.relu(F.linear(x, layer.weight, layer.bias))
    return x, running


def order_of(head: Any, seed: int = 0) -> tuple[float, ...]:
    """Call a head on 30 rows of one image and return their order, as shuffled."""
    orders = rois.record_orders(head)
    with head.image_rows((30,)):
        call(head, rois.rois(30, seed))
    return tuple(orders[0].tolist())


_STAGES = ["res2", "res3", "res4", "res5"]
_NARROW: dict[str, dict[str, Any]] = {
    "RESNETS": {"NORM": "BN", "OUT_FEATURES": _STAGES},
    "FPN": {"IN_FEATURES": _STAGES},
    "RPN": {
        "IN_FEATURES": [*LEVELS, "p6"],
        "POST_NMS_TOPK_TRAIN": 20,
        "POST_NMS_TOPK_TEST": 10,
    },
    "ROI_HEADS": {
        "NAME": "NormImagesROIHeads",
        "IN_FEATURES": [*LEVELS],
        "NUM_CLASSES": 3,
        "BATCH_SIZE_PER_IMAGE": 8,
    },
    "ROI_BOX_HEAD": {"NAME": "NormBoxHead", "NUM_CONV": 2, "NUM_FC": 1, "CONV_DIM": 8, "FC_DIM": 8},
    "ROI_MASK_HEAD": {"NAME": "NormMaskHead", "NUM_CONV": 2, "CONV_DIM": 8},
}


def mask_config(
    data: str = "no data", output_dir: str | Path = "no output", **overrides: Any
) -> CfgNode:
    """Return a config of a narrow Mask R-CNN with BN heads of ours; keys with "__" for the dots."""
    keys = {
        "MODEL__META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL__MASK_ON": True,
        "MODEL__BACKBONE__NAME": "build_resnet_fpn_backbone",
        "MODEL__ROI_BOX_HEAD__POOLER_RESOLUTION": 3,
        "MODEL__ROI_MASK_HEAD__POOLER_RESOLUTION": 4,
        **norms("BN"),
        **{f"MODEL__{part}__{k}": v for part, keys in _NARROW.items() for k, v in keys.items()},
    }
    return tiny_config(data, output_dir, **{**keys, **overrides})


CASCADE = {
    "MODEL__ROI_HEADS__NAME": "CascadeROIHeads",
    "MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True,
}
SHUFFLED = {
    "MODEL__ROI_BOX_HEAD__NAME": "ShuffleBNBoxHead",
    "MODEL__ROI_MASK_HEAD__NAME": "ShuffleBNMaskHead",
}


def norms(name: str) -> dict[str, str]:
    """Return the keys of :func:`mask_config` that give both heads a norm."""
    return {"MODEL__ROI_BOX_HEAD__NORM": name, "MODEL__ROI_MASK_HEAD__NORM": name}


def roi_inputs(boxes_per_image: Sequence[int], seed: int = 0) -> tuple[Any, ...]:
    """Return the arguments of ROI heads: images, features, proposals, targets.

    Of the boxes of an image the first is also its ground truth; without a box there is none.
    """
    generator = torch.Generator().manual_seed(seed)
    images = len(boxes_per_image)
    features = {
        level: torch.randn(images, 8, SIZE[0] // 2**i, SIZE[1] // 2**i, generator=generator)
        for i, level in enumerate(LEVELS, start=2)
    }
    proposals, targets = [], []
    for count in boxes_per_image:
        corner = torch.rand(count, 2, generator=generator) * 24
        boxes = torch.cat([corner, corner + 8 + corner.flip(1) / 2], dim=1)
        logits = torch.zeros(count)
        proposals.append(Instances(SIZE, proposal_boxes=Boxes(boxes), objectness_logits=logits))
        true = boxes[:1]
        masks = torch.zeros(len(true), *SIZE, dtype=torch.bool)
        masks[:, 8:20, 8:20] = True
        classes = torch.ones(len(true), dtype=torch.int64)
        targets.append(
            Instances(SIZE, gt_boxes=Boxes(true), gt_classes=classes, gt_masks=BitMasks(masks))
        )
    return ImageList(torch.zeros(images, 3, *SIZE), [SIZE] * images), features, proposals, targets


def register_masks(folder: str | Path, images: int = 4) -> str:
    """Generate and register a few images of the shapes data set, and return their name."""
    data = ensure_shapes("shapes_val", root=folder, num_images=images)
    name = f"masks in {folder}"
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, str(data / "annotations.json"), str(data / "images"))
    return name
