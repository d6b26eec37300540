"""Mask heads with the package's norms, with and without shuffled RoIs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY, MaskRCNNConvUpsampleHead
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference
from detectron2.structures import Instances
from torch import Tensor

from rethinking_bn.config import check_has_keys
from rethinking_bn.modeling.norm_head import Norm, NormHead, norm_factory, rows_of_images
from rethinking_bn.modeling.norm_options import norm_options
from rethinking_bn.modeling.shuffle_head import ShuffleHead


@ROI_MASK_HEAD_REGISTRY.register()
class NormMaskHead(NormHead, MaskRCNNConvUpsampleHead):
    """detectron2's mask head with the package's norms (Tables 3 and 6 of arXiv 2105.07576).

    Layers, names, state dict, initialisation and loss are detectron2's; the deconvolution and the
    predictor have no norm, as there. Its BN and SyncBN bear empty batches: in training they leave
    the running statistics alone.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        conv_dims: Sequence[int],
        conv_norm: Norm = "",
        norm_images: int = 0,
        norm_arguments: Mapping[str, Any] | None = None,
        allow_missing_statistics: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: channels, height and width of a pooled RoI.
            num_classes: foreground classes K; 1 for class-agnostic masks.
            conv_dims: output channels of each 3x3 convolution, which norm and ReLU follow, and, as
                the last one, of the deconvolution.
            conv_norm, norm_images, norm_arguments, allow_missing_statistics: as for
                :class:`~rethinking_bn.modeling.box_head.NormBoxHead`.
            kwargs: loss_weight and vis_period of detectron2's BaseMaskRCNNHead.

        Raises:
            ValueError: for an unknown norm, or a positive ``norm_images`` with SyncBN or MABN.
        """
        norm = norm_factory(conv_norm, norm_arguments or {}, "MODEL.ROI_MASK_HEAD.NORM")
        super().__init__(
            input_shape,
            num_classes=num_classes,
            conv_dims=list(conv_dims),
            conv_norm=norm,
            **kwargs,
        )
        self.init_norms(norm_images)
        self.allow_missing_statistics = allow_missing_statistics

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read MODEL.ROI_MASK_HEAD, MODEL.ROI_HEADS.NORM_IMAGES and the norm's own keys."""
        check_has_keys(cfg)
        arguments = super().from_config(cfg, input_shape)
        arguments["allow_missing_statistics"] = cfg.MODEL.ALLOW_MISSING_STATISTICS
        arguments["norm_images"] = cfg.MODEL.ROI_HEADS.NORM_IMAGES
        arguments["norm_arguments"] = norm_options(cfg, cfg.MODEL.ROI_MASK_HEAD.NORM)
        return arguments

    def forward(self, x: Tensor, instances: list[Instances]):  # type: ignore[no-untyped-def]
        """
        Args:
            x: (R, C, H, W), one row per RoI; R may be 0.
            instances: of each image, R in all; see detectron2's BaseMaskRCNNHead.

        Returns:
            the losses in training, otherwise the instances with their masks.
        """
        if torch.jit.is_scripting():
            mask_rcnn_inference(self.forward_unshuffled(x), instances)
            return instances
        else:  # not compiled by TorchScript
            with self.image_rows(rows_of_images(instances)):
                return super().forward(x, instances)

    def layers(self, x: Tensor) -> Tensor:
        """Return logits (R, K, 2H, 2W) for (R, C, H, W)."""
        if torch.jit.is_scripting():
            return self.forward_unshuffled(x)
        else:  # not compiled by TorchScript
            with self.normalizing_images(len(x)):
                return super().layers(x)


@ROI_MASK_HEAD_REGISTRY.register()
class ShuffleBNMaskHead(ShuffleHead, NormMaskHead):
    """NormMaskHead that normalises RoIs shuffled over all ranks ("shuffle BN", section 6).

    In training, each row travels to a rank as pooled: C·H·W numbers, 50,176 for 256x14x14. It
    returns where it is smallest after the last normalised layer: as the last normalised feature
    map (50,176 numbers) or as logits (K·2H·2W: 2,352 for 3 classes, but 62,720 for 80, which
    therefore take the former). As many numbers travel in the backward. Rows that stay on their
    rank are not sent. See :class:`~rethinking_bn.modeling.shuffle_head.ShuffleHead`.
    """

    seed_of_head = 1

    def layers(self, x: Tensor) -> Tensor:
        """As :meth:`NormMaskHead.layers`; a collective in training, which every rank must call."""
        if torch.jit.is_scripting():
            return self.forward_unshuffled(x)
        else:  # not compiled by TorchScript
            return self.forward_shuffled(x) if self.communicates else super().layers(x)
