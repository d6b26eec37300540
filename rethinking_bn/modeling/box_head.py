"""Box heads with the package's norms, with and without shuffled RoIs."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY, FastRCNNConvFCHead
from torch import Tensor

from rethinking_bn.modeling.norm_head import NormHead, ShuffleHead
from rethinking_bn.modeling.roi_heads import check_image_rows_are_told


@ROI_BOX_HEAD_REGISTRY.register()
class NormBoxHead(NormHead, FastRCNNConvFCHead):
    """detectron2's box head with the package's norms (Tables 3 and 6 of arXiv 2105.07576).

    Layers, names, state dict and initialisation are detectron2's. Its BN and SyncBN take empty
    batches: in training they leave the running statistics alone. Arguments are those of
    :class:`~rethinking_bn.modeling.norm_head.NormHead`.
    """

    section = "ROI_BOX_HEAD"
    norm_keys = ("MODEL.ROI_BOX_HEAD.NORM",)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """As NormHead's; a ValueError for NORM_IMAGES in ROI heads that tell no image rows."""
        arguments = super().from_config(cfg, input_shape)
        check_image_rows_are_told(cfg)
        return arguments

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (R, C, H, W), one row per RoI; R may be 0.

        Returns:
            (R, fc_dims[-1]), or (R, conv_dims[-1], H, W) without fully connected layers.

        Raises:
            ValueError: with ``norm_images``, outside of ``image_rows(...)``.
        """
        return self.forward_unshuffled(x) if torch.jit.is_scripting() else self.forward_images(x)


@ROI_BOX_HEAD_REGISTRY.register()
class ShuffleBNBoxHead(ShuffleHead, NormBoxHead):
    """NormBoxHead that normalises RoIs shuffled over all ranks ("shuffle BN", section 6).

    In training, each row travels to a rank as pooled: C·H·W numbers, 12,544 for 256x7x7. It
    returns where it is smallest after the last normalised layer: after the fully connected
    layers (1,024 numbers in the 4conv1fc head), or as the last feature map where there are none
    or they are wider. As many numbers travel in the backward. Rows that stay on their rank are
    not sent. See :class:`~rethinking_bn.modeling.norm_head.ShuffleHead`.
    """

    seed_of_head = 0
