"""Mask R-CNN's heads with the package's norms, with and without shuffled RoIs.

The ROI heads are detectron2's, but tell box and mask heads which RoIs are of one image
(MODEL.ROI_HEADS.NORM_IMAGES). Box and mask heads are detectron2's but for their norms: layers,
names, state dict, initialisation and losses are the same (Tables 3 and 6 of arXiv 2105.07576).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    CascadeROIHeads,
    FastRCNNConvFCHead,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference
from detectron2.structures import Instances
from torch import Tensor, nn

from rethinking_bn.config import check_has_keys
from rethinking_bn.modeling.norm_head import NormHead, ShuffleHead

_KEY = "MODEL.ROI_HEADS.NORM_IMAGES"
_STOCK = StandardROIHeads._forward_box


@ROI_BOX_HEAD_REGISTRY.register()
class NormBoxHead(NormHead, FastRCNNConvFCHead):
    """detectron2's box head with the package's norms.

    Its BN and SyncBN take empty batches: in training they leave the running statistics alone.
    Arguments are those of :class:`~rethinking_bn.modeling.norm_head.NormHead`.
    """

    section = "ROI_BOX_HEAD"
    norm_keys = ("MODEL.ROI_BOX_HEAD.NORM",)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """As NormHead's; a ValueError for NORM_IMAGES in ROI heads that tell no image rows."""
        arguments = super().from_config(cfg, input_shape)
        name = cfg.MODEL.ROI_HEADS.NAME
        if arguments["norm_images"] and name in ROI_HEADS_REGISTRY:
            if _KEY not in getattr(ROI_HEADS_REGISTRY.get(name), "reads", ()):
                raise ValueError(
                    f"{_KEY} is {arguments['norm_images']}, but {name} does not tell the box head "
                    "which RoIs are of one image: set MODEL.ROI_HEADS.NAME to NormImagesROIHeads "
                    "or NormImagesCascadeROIHeads"
                )
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


@ROI_MASK_HEAD_REGISTRY.register()
class NormMaskHead(NormHead, MaskRCNNConvUpsampleHead):
    """detectron2's mask head with the package's norms.

    The deconvolution and the predictor have no norm, as in detectron2's. All that is said of
    :class:`NormBoxHead` holds here, too.
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
            with _image_rows(self, instances):
                return super().forward(x, instances)

    def layers(self, x: Tensor) -> Tensor:
        """Return logits (R, K, 2H, 2W) for (R, C, H, W)."""
        return self.forward_images(x)


@ROI_MASK_HEAD_REGISTRY.register()
class ShuffleBNMaskHead(ShuffleHead, NormMaskHead):
    """NormMaskHead that normalises RoIs shuffled over all ranks ("shuffle BN", section 6).

    Rows travel as those of :class:`ShuffleBNBoxHead`: each as pooled (50,176 numbers for
    256x14x14), and back as the last normalised feature map (50,176 numbers) or as logits, which
    are K·2H·2W: 2,352 for 3 classes, but 62,720 for 80, which therefore take the former.
    """

    seed_of_head = 1


class _TellsImageRows:
    """Mixin, before detectron2's ROI heads, that checks whether the heads can be told."""

    reads = (_KEY,)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        """Read what detectron2's class reads, and MODEL.ROI_HEADS.NORM_IMAGES.

        Raises:
            ValueError: if NORM_IMAGES is set for heads that know nothing of it, or ``cfg`` lacks
                this project's keys.
        """
        check_has_keys(cfg)
        arguments = super().from_config(cfg, input_shape)  # type: ignore[misc]
        heads = [("BOX", head) for head in arguments.get("box_heads") or [arguments["box_head"]]]
        heads += [("MASK", arguments["mask_head"])] if "mask_head" in arguments else []
        for key, head in heads if cfg.MODEL.ROI_HEADS.NORM_IMAGES else ():
            if not isinstance(head, NormHead):
                raise ValueError(
                    f"{_KEY} is {cfg.MODEL.ROI_HEADS.NORM_IMAGES}, but {type(head).__name__} "
                    f"(MODEL.ROI_{key}_HEAD.NAME) knows nothing of it: use one of this package's"
                )
        return arguments


@ROI_HEADS_REGISTRY.register()
class NormImagesROIHeads(_TellsImageRows, StandardROIHeads):
    """detectron2's StandardROIHeads, whose box head learns how many RoIs each image has.

    That is all it adds: mask heads see the instances anyway, and with NORM_IMAGES 0, or another
    package's box head, nothing differs.
    """

    # as detectron2.export annotates its own class: TorchScript leaves out what is not on
    __annotations__ = {"mask_on": torch.jit.Final[bool], "keypoint_on": torch.jit.Final[bool]}

    # TorchScript knows no super(), and finds a method by its function's name: detectron2's method
    # needs a second one
    _forward_all_boxes = FunctionType(_STOCK.__code__, _STOCK.__globals__, "_forward_all_boxes")

    def _forward_box(  # type: ignore[no-untyped-def]
        self, features: dict[str, Tensor], proposals: list[Instances]
    ):
        if torch.jit.is_scripting():
            return self._forward_all_boxes(features, proposals)
        else:  # not compiled by TorchScript
            with _image_rows(self.box_head, proposals):
                return super()._forward_box(features, proposals)


@ROI_HEADS_REGISTRY.register()
class NormImagesCascadeROIHeads(_TellsImageRows, CascadeROIHeads):
    """detectron2's CascadeROIHeads; adds what :class:`NormImagesROIHeads` adds, at every stage."""

    def _run_stage(self, features: list[Tensor], proposals: list[Instances], stage: int) -> Any:
        with _image_rows(self.box_head[stage], proposals):
            return super()._run_stage(features, proposals, stage)


def _image_rows(head: nn.Module, instances: Sequence[Instances]) -> AbstractContextManager[None]:
    """Tell a head of ours how many of the instances are of each image."""
    if not isinstance(head, NormHead):
        return nullcontext()
    # not len(), which would make constants of what torch.jit.trace follows
    return head.image_rows([of_image.__len__() for of_image in instances])
