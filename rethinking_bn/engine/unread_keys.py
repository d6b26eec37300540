"""Keys of ours that are set and that nothing in the chosen model reads."""

from __future__ import annotations

import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN, RetinaNet
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    Res5ROIHeads,
)

from rethinking_bn.modeling.norm_head import NormHead

logger = logging.getLogger(__name__)


def check_keys_are_read(cfg: CfgNode) -> None:
    """Raise a ValueError, in one line, for keys of ours that nothing in the model will read."""
    unread = unread_keys(cfg)
    if unread:
        raise ValueError("; ".join(unread))


def warn_of_unread_keys(cfg: Any) -> None:
    """Log them as warnings: for parts of ours in a trainer that has built its model already."""
    if isinstance(cfg, CfgNode):
        for line in unread_keys(cfg):
            logger.warning("%s", line)


def unread_keys(cfg: CfgNode) -> list[str]:
    """Name the keys of ours that are set and that the chosen components will not read.

    detectron2's components know nothing of these keys: what they ask for would silently not be
    there. Components of other projects may read what they like.

    Args:
        cfg: may lack keys.

    Returns:
        one line per key, with what would read it.
    """
    model = cfg.MODEL
    if model.META_ARCHITECTURE not in META_ARCH_REGISTRY:
        return []  # building the model says so
    architecture = META_ARCH_REGISTRY.get(model.META_ARCHITECTURE)
    here = f"MODEL.META_ARCHITECTURE {model.META_ARCHITECTURE}"
    found: list[tuple[str, Any, str]] = []
    if _is_detectron2s(architecture):
        keys = {f"BN.{name}": value for name, value in model.RETINANET.get("BN", {}).items()}
        keys["HEAD_NAME"] = model.RETINANET.get("HEAD_NAME", "RetinaNetHead")
        for name, value in keys.items():
            if value not in ("", "RetinaNetHead"):
                remedy = f"{here} does not read it: set that to ConfigurableHeadRetinaNet"
                found.append((f"MODEL.RETINANET.{name}", value, remedy))
    images = ("MODEL.ROI_HEADS.NORM_IMAGES", model.ROI_HEADS.get("NORM_IMAGES", 0))
    box = ("MODEL.ROI_BOX_HEAD.NAME", model.ROI_BOX_HEAD.NAME)
    mask = ("MODEL.ROI_MASK_HEAD.NAME", model.ROI_MASK_HEAD.NAME)
    heads = [
        (key, name)
        for registry, (key, name) in ((ROI_BOX_HEAD_REGISTRY, box), (ROI_MASK_HEAD_REGISTRY, mask))
        if name in registry and issubclass(registry.get(name), NormHead)
    ]
    if issubclass(architecture, RetinaNet) or (
        _is_detectron2s(architecture) and not issubclass(architecture, GeneralizedRCNN)
    ):
        without = f"{here} has no RoI heads: set that to GeneralizedRCNN"
        found += [(key, value, without) for key, value in (images, *heads) if value]
    elif model.ROI_HEADS.NAME in ROI_HEADS_REGISTRY:
        roi_heads = ROI_HEADS_REGISTRY.get(model.ROI_HEADS.NAME)
        that = f"MODEL.ROI_HEADS.NAME {model.ROI_HEADS.NAME} does not read it: set that to "
        if images[1] and _is_detectron2s(roi_heads):
            found.append((*images, that + "NormImagesROIHeads or NormImagesCascadeROIHeads"))
        if box in heads and issubclass(roi_heads, Res5ROIHeads):
            found.append((*box, that + "StandardROIHeads or NormImagesROIHeads"))
    builder = model.BACKBONE.NAME
    images = ("MODEL.BACKBONE.NORM_IMAGES", model.BACKBONE.get("NORM_IMAGES", 0))
    if (
        images[1]
        and builder in BACKBONE_REGISTRY
        and _is_detectron2s(BACKBONE_REGISTRY.get(builder))
    ):
        remedy = (
            f"MODEL.BACKBONE.NAME {builder} does not read it: set that to a build_norm_ backbone"
        )
        found.append((*images, remedy))
    return [f"{key} is {value!r}, but {why}, or leave it out" for key, value, why in found]


def _is_detectron2s(component: Any) -> bool:
    """Return whether it is detectron2's own code that reads a component's keys."""
    reader = getattr(component, "from_config", component)
    return getattr(reader, "__func__", reader).__module__.startswith("detectron2.")
