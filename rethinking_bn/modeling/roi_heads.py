"""ROI heads that tell their heads which RoIs are of one image, for MODEL.ROI_HEADS.NORM_IMAGES."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, CascadeROIHeads, StandardROIHeads
from detectron2.structures import Instances
from torch import Tensor, nn

from rethinking_bn.config import check_has_keys
from rethinking_bn.modeling.norm_head import NormHead, rows_of_images

_KEY = "MODEL.ROI_HEADS.NORM_IMAGES"
_STOCK = StandardROIHeads._forward_box


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
        boxes = arguments.get("box_heads") or [arguments["box_head"]]
        masks = [arguments["mask_head"]] if "mask_head" in arguments else []
        for key, heads in (("BOX", boxes), ("MASK", masks)):
            for head in heads if cfg.MODEL.ROI_HEADS.NORM_IMAGES else ():
                if not isinstance(head, NormHead):
                    raise ValueError(
                        f"{_KEY} is {cfg.MODEL.ROI_HEADS.NORM_IMAGES}, but {type(head).__name__} "
                        f"(MODEL.ROI_{key}_HEAD.NAME) knows nothing of it: use one of this "
                        "package's heads"
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


def check_image_rows_are_told(cfg: CfgNode) -> None:
    """Raise a ValueError if NORM_IMAGES is set and MODEL.ROI_HEADS.NAME tells no image rows."""
    name = cfg.MODEL.ROI_HEADS.NAME
    if not cfg.MODEL.ROI_HEADS.NORM_IMAGES or name not in ROI_HEADS_REGISTRY:
        return
    if _KEY not in getattr(ROI_HEADS_REGISTRY.get(name), "reads", ()):
        raise ValueError(
            f"{_KEY} is {cfg.MODEL.ROI_HEADS.NORM_IMAGES}, but {name} does not tell the box head "
            "which RoIs are of one image: set MODEL.ROI_HEADS.NAME to NormImagesROIHeads or "
            "NormImagesCascadeROIHeads"
        )


def _image_rows(head: nn.Module, proposals: list[Instances]) -> AbstractContextManager[None]:
    if not isinstance(head, NormHead):
        return nullcontext()
    return head.image_rows(rows_of_images(proposals))
