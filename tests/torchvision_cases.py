"""Tiny torchvision detectors on 64-pixel images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from rethinking_bn.torchvision import (
    MultiDomainBNRetinaNetHead,
    ShuffleBNBoxHead,
    ShuffleBNMaskHead,
)
from tests.reference import levels

SIZE, CHANNELS, LEVELS, ANCHORS, CLASSES = 64, 8, 3, 2, 4
CHOICES = ("shared", "domain_specific")
ROW1, ROW6 = (dict.fromkeys(("train_stats", "population_stats", "affine"), c) for c in CHOICES)


class TinyBackbone(nn.Module):
    """Three strided convolutions and an FPN over them: maps of 16, 8 and 4 pixels."""

    out_channels = CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1)
        self.stages = nn.ModuleList(
            nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1) for _ in range(LEVELS)
        )
        self.fpn = FeaturePyramidNetwork([CHANNELS] * LEVELS, CHANNELS)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, maps = self.stem(x), {}
        for level, stage in enumerate(self.stages):
            maps[str(level)] = x = stage(x.relu())
        return self.fpn(maps)


def make_head(norm_layer: Any = "BN", seed: int = 0, **options: Any) -> MultiDomainBNRetinaNetHead:
    """Return a head for :class:`TinyBackbone` with initial weights drawn from a seed."""
    torch.manual_seed(seed)
    return MultiDomainBNRetinaNetHead(
        CHANNELS, ANCHORS, CLASSES, norm_layer, num_levels=LEVELS, **options
    )


def retinanet(head: nn.Module) -> RetinaNet:
    """Return a tiny RetinaNet around a head."""
    torch.manual_seed(1)
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((0.5, 1.0),) * LEVELS)
    return RetinaNet(
        TinyBackbone(),
        CLASSES,
        anchor_generator=anchors,
        head=head,
        min_size=SIZE,
        max_size=SIZE,
        score_thresh=0.0,
    )


def mask_rcnn(norm_layer: Any = "BN") -> MaskRCNN:
    """Return a tiny Mask R-CNN with the shuffling heads."""
    torch.manual_seed(1)
    names = [str(level) for level in range(LEVELS)]
    return MaskRCNN(
        TinyBackbone(),
        min_size=SIZE,
        max_size=SIZE,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * LEVELS),
        rpn_post_nms_top_n_train=20,
        rpn_post_nms_top_n_test=10,
        box_batch_size_per_image=16,
        box_roi_pool=MultiScaleRoIAlign(names, 4, 2),
        box_head=ShuffleBNBoxHead((CHANNELS, 4, 4), [8, 8], [16], norm_layer),
        box_predictor=FastRCNNPredictor(16, CLASSES),
        box_score_thresh=0.0,
        mask_roi_pool=MultiScaleRoIAlign(names, 6, 2),
        mask_head=ShuffleBNMaskHead(CHANNELS, [8, 8], 1, norm_layer),
        mask_predictor=MaskRCNNPredictor(8, 8, CLASSES),
    )


def batch(seed: int = 0, images: int = 2) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Return (images, targets) as torchvision's collate function makes them."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(images):
        corner = torch.rand(3, 2, generator=generator) * 30
        boxes = torch.cat([corner, corner + 10 + corner.flip(1) / 2], dim=1)
        masks = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        target = {"boxes": boxes, "labels": torch.tensor([1, 2, 3]), "masks": masks}
        samples.append((torch.rand(3, SIZE, SIZE, generator=generator), target))
    return tuple(zip(*samples, strict=True))  # type: ignore[return-value]


def features(seed: int = 0, images: int = 2) -> list[Tensor]:
    """Return feature maps whose statistics differ from level to level; float64."""
    return levels(seed, images, [(6, 6), (4, 4), (2, 2)], CHANNELS)
