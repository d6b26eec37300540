"""Small RetinaNets and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from torch import Tensor

from tests.engine.tiny import tiny_config

SIZES = ((8, 8), (4, 4), (2, 3), (1, 2), (1, 1))


def retinanet_config(**overrides: Any) -> CfgNode:
    """Return a config of our RetinaNet with a frozen backbone; keys with "__" for the dots."""
    return tiny_config(
        "no data",
        "no output",
        **{
            "MODEL__META_ARCHITECTURE": "ConfigurableHeadRetinaNet",
            "MODEL__RESNETS__NORM": "FrozenBN",
            "MODEL__FPN__OUT_CHANNELS": 32,
            "MODEL__RETINANET__NUM_CONVS": 2,
            **overrides,
        },
    )


def head_arguments(**overrides: Any) -> dict[str, Any]:
    """Return arguments of a five-level head of 32 channels."""
    return {
        "input_shape": [ShapeSpec(channels=32, stride=2**level) for level in range(3, 8)],
        "num_classes": 2,
        "num_anchors": 3,
        "conv_dims": [32, 32],
        **overrides,
    }


def features(
    images: int = 2, channels: int = 32, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return five levels whose statistics differ."""
    return [
        torch.randn(images, channels, *size, dtype=dtype) * (level + 1) + level
        for level, size in enumerate(SIZES)
    ]


def training_batch(images: int = 2) -> list[dict[str, Any]]:
    """Return detectron2's input: noise images 64 x 64, one box each."""
    batch = []
    for index in range(images):
        instances = Instances((64, 64))
        instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0 + index, 40.0]]))
        instances.gt_classes = torch.tensor([index % 2])
        image = torch.randint(0, 255, (3, 64, 64)).float()
        batch.append({"image": image, "instances": instances, "height": 64, "width": 64})
    return batch
