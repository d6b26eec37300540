"""Box heads with the package's norms, with and without shuffled RoIs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY, FastRCNNConvFCHead
from torch import Tensor

from rethinking_bn.config import check_has_keys
from rethinking_bn.modeling.norm_head import Norm, NormHead, norm_factory
from rethinking_bn.modeling.norm_options import norm_options
from rethinking_bn.modeling.roi_heads import check_image_rows_are_told
from rethinking_bn.modeling.shuffle_head import ShuffleHead


@ROI_BOX_HEAD_REGISTRY.register()
class NormBoxHead(NormHead, FastRCNNConvFCHead):
    """detectron2's box head with the package's norms (Tables 3 and 6 of arXiv 2105.07576).

    Layers, names, state dict and initialisation are detectron2's. Its BN and SyncBN bear empty
    batches: in training they leave the running statistics alone.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        conv_dims: Sequence[int],
        fc_dims: Sequence[int],
        conv_norm: Norm = "",
        norm_images: int = 0,
        norm_arguments: Mapping[str, Any] | None = None,
        allow_missing_statistics: bool = False,
    ) -> None:
        """
        Args:
            input_shape: channels, height and width of a pooled RoI.
            conv_dims: output channels of each 3x3 convolution, which norm and ReLU follow.
            fc_dims: output channels of each fully connected layer.
            conv_norm: "BN" (statistics of this rank), "SyncBN" (pooled over ranks), "BatchStatBN"
                (the mini-batch's at inference too), "GN", "LN", "MABN" (the convolutions then have
                centred filters), "" or None; or a callable from channels to a layer.
            norm_images: images whose RoIs are normalised together, see
                :class:`~rethinking_bn.modeling.norm_head.NormHead`; 0: all.
            norm_arguments: further arguments of :func:`rethinking_bn.layers.get_norm`.
            allow_missing_statistics: whether weights without the statistics of a norm layer load;
                those then stay as they are.

        Raises:
            ValueError: for an unknown norm, or a positive ``norm_images`` with SyncBN or MABN.
        """
        norm = norm_factory(conv_norm, norm_arguments or {}, "MODEL.ROI_BOX_HEAD.NORM")
        super().__init__(
            input_shape, conv_dims=list(conv_dims), fc_dims=list(fc_dims), conv_norm=norm
        )
        self.init_norms(norm_images)
        self.allow_missing_statistics = allow_missing_statistics

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read MODEL.ROI_BOX_HEAD, MODEL.ROI_HEADS.NORM_IMAGES and the norm's own keys."""
        check_has_keys(cfg)
        arguments = super().from_config(cfg, input_shape)
        arguments["allow_missing_statistics"] = cfg.MODEL.ALLOW_MISSING_STATISTICS
        arguments["norm_images"] = cfg.MODEL.ROI_HEADS.NORM_IMAGES
        arguments["norm_arguments"] = norm_options(cfg, cfg.MODEL.ROI_BOX_HEAD.NORM)
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
        if torch.jit.is_scripting():
            return self.forward_unshuffled(x)
        else:  # not compiled by TorchScript
            with self.normalizing_images(len(x)):
                return super().forward(x)


@ROI_BOX_HEAD_REGISTRY.register()
class ShuffleBNBoxHead(ShuffleHead, NormBoxHead):
    """NormBoxHead that normalises RoIs shuffled over all ranks ("shuffle BN", section 6).

    In training, each row travels to a rank as pooled: C·H·W numbers, 12,544 for 256x7x7. It
    returns where it is smallest after the last normalised layer: after the fully connected
    layers (1,024 numbers in the 4conv1fc head), or as the last feature map where there are none
    or they are wider. As many numbers travel in the backward. Rows that stay on their rank are
    not sent. See :class:`~rethinking_bn.modeling.shuffle_head.ShuffleHead`.
    """

    seed_of_head = 0

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`NormBoxHead.forward`; a collective in training, which every rank must call."""
        if torch.jit.is_scripting():
            return self.forward_unshuffled(x)
        else:  # not compiled by TorchScript
            return self.forward_shuffled(x) if self.communicates else super().forward(x)
