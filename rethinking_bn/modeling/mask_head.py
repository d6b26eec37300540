"""Mask heads with the package's norms, with and without shuffled RoIs."""

from __future__ import annotations

import torch
from detectron2.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY, MaskRCNNConvUpsampleHead
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference
from detectron2.structures import Instances
from torch import Tensor

from rethinking_bn.modeling.norm_head import NormHead, ShuffleHead, rows_of_images


@ROI_MASK_HEAD_REGISTRY.register()
class NormMaskHead(NormHead, MaskRCNNConvUpsampleHead):
    """detectron2's mask head with the package's norms (Tables 3 and 6 of arXiv 2105.07576).

    Layers, names, state dict, initialisation and loss are detectron2's; the deconvolution and the
    predictor have no norm, as there. Its BN and SyncBN take empty batches: in training they leave
    the running statistics alone. Arguments are those of
    :class:`~rethinking_bn.modeling.norm_head.NormHead`.
    """

    section = "ROI_MASK_HEAD"
    norm_keys = ("MODEL.ROI_MASK_HEAD.NORM",)

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
        return self.forward_images(x)


@ROI_MASK_HEAD_REGISTRY.register()
class ShuffleBNMaskHead(ShuffleHead, NormMaskHead):
    """NormMaskHead that normalises RoIs shuffled over all ranks ("shuffle BN", section 6).

    In training, each row travels to a rank as pooled: C·H·W numbers, 50,176 for 256x14x14. It
    returns where it is smallest after the last normalised layer: as the last normalised feature
    map (50,176 numbers) or as logits (K·2H·2W: 2,352 for 3 classes, but 62,720 for 80, which
    therefore take the former). As many numbers travel in the backward. Rows that stay on their
    rank are not sent. See :class:`~rethinking_bn.modeling.norm_head.ShuffleHead`.
    """

    seed_of_head = 1
