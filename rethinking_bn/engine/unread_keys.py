"""Keys of ours that are set and that nothing in the chosen model reads."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)
from detectron2.modeling.meta_arch import GeneralizedRCNN, RetinaNet
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    Res5ROIHeads,
)

from rethinking_bn.config import our_keys
from rethinking_bn.modeling import RETINANET_HEAD, ConfigurableHeadRetinaNet, DistilledRetinaNet
from rethinking_bn.modeling.norm_head import NormHead

Unread = tuple[str, Any, str]  # key, value, and what would read it

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
    found = [
        *_of_architecture(model, architecture),
        *_of_roi_heads(model, architecture),
        *_of_backbone(model),
        *_of_norms(model, architecture),
    ]
    return [f"{key} is {value!r}, but {why}, or leave it out" for key, value, why in found]


def _of_architecture(model: CfgNode, architecture: type) -> Iterator[Unread]:
    here = f"MODEL.META_ARCHITECTURE {model.META_ARCHITECTURE}"
    if _is_detectron2s(architecture):
        keys = {f"BN.{name}": value for name, value in model.RETINANET.get("BN", {}).items()}
        keys["HEAD_NAME"] = model.RETINANET.get("HEAD_NAME", "RetinaNetHead")
        for name, value in keys.items():
            if value not in ("", "RetinaNetHead"):
                remedy = f"{here} does not read it: set that to ConfigurableHeadRetinaNet"
                yield f"MODEL.RETINANET.{name}", value, remedy
    if _is_known(architecture) and not issubclass(architecture, DistilledRetinaNet):
        for name, value in _changed(model, "DISTILL"):
            yield name, value, f"{here} does not read it: set that to DistilledRetinaNet"
    groups = model.get("DOMAIN_BN", {}).get("DATASETS", ())
    follows = "MODEL.DOMAIN_BN" in getattr(architecture, "reads", ())
    for name, value in _changed(model, "DOMAIN_BN"):
        if not groups:
            yield name, value, "there are no domains: name them in MODEL.DOMAIN_BN.DATASETS"
        elif _is_known(architecture) and not follows:
            ours = "ConfigurableHeadRetinaNet or DomainRCNN"
            yield name, value, f"{here} does not read it: set that to {ours}"


def _of_roi_heads(model: CfgNode, architecture: type) -> Iterator[Unread]:
    images = ("MODEL.ROI_HEADS.NORM_IMAGES", model.ROI_HEADS.get("NORM_IMAGES", 0))
    heads = [(f"MODEL.{key}.NAME", model[key].NAME) for key in _norm_heads(model)]
    if issubclass(architecture, RetinaNet) or (
        _is_detectron2s(architecture) and not issubclass(architecture, GeneralizedRCNN)
    ):
        here = f"MODEL.META_ARCHITECTURE {model.META_ARCHITECTURE}"
        for key, value in (images, *heads):
            if value:
                yield key, value, f"{here} has no RoI heads: set that to GeneralizedRCNN"
    elif model.ROI_HEADS.NAME in ROI_HEADS_REGISTRY:
        roi_heads = ROI_HEADS_REGISTRY.get(model.ROI_HEADS.NAME)
        that = f"MODEL.ROI_HEADS.NAME {model.ROI_HEADS.NAME} does not read it: set that to "
        if images[1] and _is_detectron2s(roi_heads):
            yield *images, that + "NormImagesROIHeads or NormImagesCascadeROIHeads"
        if issubclass(roi_heads, Res5ROIHeads):
            for key, value in heads:
                if key == "MODEL.ROI_BOX_HEAD.NAME":
                    yield key, value, that + "StandardROIHeads or NormImagesROIHeads"


def _of_backbone(model: CfgNode) -> Iterator[Unread]:
    builder, images = model.BACKBONE.NAME, model.BACKBONE.get("NORM_IMAGES", 0)
    if images and builder in BACKBONE_REGISTRY and _is_detectron2s(BACKBONE_REGISTRY.get(builder)):
        why = f"MODEL.BACKBONE.NAME {builder} does not read it: set that to a build_norm_ backbone"
        yield "MODEL.BACKBONE.NORM_IMAGES", images, why


def _of_norms(model: CfgNode, architecture: type) -> Iterator[Unread]:
    """Groups of GN are read where a component of ours, or one we do not know, has GN."""
    changed = list(_changed(model, "GN"))
    if not changed:
        return
    heads = [f"{key}.NORM" for key in _norm_heads(model)]
    parts: list[Any] = [architecture]
    if issubclass(architecture, ConfigurableHeadRetinaNet):
        heads = ["RETINANET.NORM"] if model.RETINANET.HEAD_NAME != "RetinaNetHead" else []
        if model.RETINANET.HEAD_NAME in RETINANET_HEAD:
            parts.append(RETINANET_HEAD.get(model.RETINANET.HEAD_NAME))
    if not issubclass(architecture, RetinaNet):
        for registry, key in (
            (PROPOSAL_GENERATOR_REGISTRY, "PROPOSAL_GENERATOR"),
            (ROI_HEADS_REGISTRY, "ROI_HEADS"),
            (ROI_BOX_HEAD_REGISTRY, "ROI_BOX_HEAD"),
            (ROI_MASK_HEAD_REGISTRY, "ROI_MASK_HEAD"),
        ):
            if model[key].NAME in registry:
                parts.append(registry.get(model[key].NAME))
    builder = model.BACKBONE.NAME
    if builder in BACKBONE_REGISTRY:
        parts.append(BACKBONE_REGISTRY.get(builder))
        heads += [] if _is_detectron2s(parts[-1]) else ["RESNETS.NORM", "FPN.NORM"]
    norms = {model[part][key] for part, key in (head.split(".") for head in heads)}
    if not all(map(_is_known, parts)) or "GN" in norms or "_gn_" in builder:
        return
    for name, value in changed:
        yield name, value, "no norm of this package is GN: set one of the NORM keys to GN"


def _norm_heads(model: CfgNode) -> list[str]:
    """Return which of the two RoI heads are of this package."""
    registries = {"ROI_BOX_HEAD": ROI_BOX_HEAD_REGISTRY, "ROI_MASK_HEAD": ROI_MASK_HEAD_REGISTRY}
    return [
        key
        for key, registry in registries.items()
        if model[key].NAME in registry and issubclass(registry.get(model[key].NAME), NormHead)
    ]


def _changed(model: CfgNode, part: str) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a part of ours whose values are not their defaults."""
    defaults = our_keys().MODEL[part]
    for name, value in model.get(part, {}).items():
        if name in defaults and value != defaults[name] and (value or defaults[name]):
            yield f"MODEL.{part}.{name}", value


def _is_known(component: Any) -> bool:
    """Return whether we know what a component reads: it is detectron2's or ours."""
    return _reader(component).startswith(("detectron2.", "rethinking_bn."))


def _is_detectron2s(component: Any) -> bool:
    """Return whether it is detectron2's own code that reads a component's keys."""
    return _reader(component).startswith("detectron2.")


def _reader(component: Any) -> str:
    reader = getattr(component, "from_config", component)
    return str(getattr(reader, "__func__", reader).__module__)
