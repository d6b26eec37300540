"""Which feature level of a config's anchors the objects of the shapes data set belong to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

from rethinking_bn.data.shapes import draw_sample


def share_of_levels(cfg: CfgNode, strides: Sequence[int], images: int = 40) -> Tensor:
    """Return the share of objects whose best anchor is on each level, (L,), summing up to 1."""
    generator = build_anchor_generator(cfg, [ShapeSpec(stride=stride) for stride in strides])
    height, width = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    grids = [torch.zeros(1, 1, -(-height // s), -(-width // s)) for s in strides]
    anchors = [boxes.tensor for boxes in generator(grids)]
    level = torch.cat([torch.full((len(a),), i) for i, a in enumerate(anchors)])
    everything = Boxes(torch.cat(anchors))
    best: list[int] = []
    for index in range(images):
        _, shapes = draw_sample("train", index)
        boxes = Boxes(torch.tensor([shape.box for shape in shapes], dtype=torch.float32))
        best.extend(level[pairwise_iou(boxes, everything).argmax(1)].tolist())
    return torch.bincount(torch.tensor(best), minlength=len(strides)) / len(best)
