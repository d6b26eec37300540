"""detectron2's ResNets and FPNs with GN or MABN throughout."""

from __future__ import annotations

import logging
from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import (
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)

from rethinking_bn.layers import MABN2d
from rethinking_bn.layers.convert import replace_norms
from rethinking_bn.modeling.norm_options import norm_options

logger = logging.getLogger(__name__)

Builder = Callable[[CfgNode, ShapeSpec], Backbone]


@BACKBONE_REGISTRY.register()
def build_gn_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """detectron2's build_resnet_backbone with GN; see :func:`build_with_norm`."""
    return build_with_norm(build_resnet_backbone, cfg, input_shape, "GN")


@BACKBONE_REGISTRY.register()
def build_gn_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """detectron2's build_resnet_fpn_backbone with GN; see :func:`build_with_norm`."""
    return build_with_norm(build_resnet_fpn_backbone, cfg, input_shape, "GN")


@BACKBONE_REGISTRY.register()
def build_gn_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """detectron2's build_retinanet_resnet_fpn_backbone with GN; see :func:`build_with_norm`."""
    return build_with_norm(build_retinanet_resnet_fpn_backbone, cfg, input_shape, "GN")


@BACKBONE_REGISTRY.register()
def build_mabn_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """detectron2's build_resnet_backbone with MABN; see :func:`build_with_norm`."""
    return build_with_norm(build_resnet_backbone, cfg, input_shape, "MABN")


@BACKBONE_REGISTRY.register()
def build_mabn_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """detectron2's build_resnet_fpn_backbone with MABN; see :func:`build_with_norm`."""
    return build_with_norm(build_resnet_fpn_backbone, cfg, input_shape, "MABN")


@BACKBONE_REGISTRY.register()
def build_mabn_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """detectron2's build_retinanet_resnet_fpn_backbone with MABN; see :func:`build_with_norm`."""
    return build_with_norm(build_retinanet_resnet_fpn_backbone, cfg, input_shape, "MABN")


def build_with_norm(builder: Builder, cfg: CfgNode, input_shape: ShapeSpec, norm: str) -> Backbone:
    """Build one of detectron2's backbones with a norm in every place that may have one.

    These are the stem, all convolutions of the blocks, the shortcuts, and the FPN's lateral and
    output convolutions. RetinaNet's P6 and P7, which have no norm in detectron2 and are not among
    the layers that MABN's authors name, stay plain convolutions.

    MODEL.RESNETS.NORM and MODEL.FPN.NORM are not read: the builder's name stands for both. All
    other keys keep their meaning. The first MODEL.BACKBONE.FREEZE_AT stages are frozen: no
    gradients, and MABN keeps its statistics.

    Args:
        builder: of detectron2's registry, which reads these keys.
        cfg: its ``MODEL.MABN`` is read for MABN.
        input_shape: of the image.
        norm: "GN", or another name that :func:`rethinking_bn.layers.get_norm` knows.

    Raises:
        ValueError: for deformable stages with MABN, which cannot centre their convolutions; for
            channels that GN's 32 groups do not divide; for a batch size that does not fit
            (:func:`~rethinking_bn.modeling.norm_options.norm_options`).
    """
    if norm == "MABN" and any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE):
        raise ValueError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE}, but "
            "MABN needs convolutions with centred filters, which deformable ones do not have: "
            "set it to [False, False, False, False] or take a GN backbone"
        )
    stock = cfg.clone()
    stock.defrost()
    stock.MODEL.RESNETS.NORM = stock.MODEL.FPN.NORM = "BN"
    stock.MODEL.BACKBONE.FREEZE_AT = 0  # after the conversion: detectron2 freezes by replacing BN
    backbone = builder(stock, input_shape)
    replace_norms(backbone, norm, **norm_options(cfg, norm))
    resnet = backbone if isinstance(backbone, ResNet) else backbone.bottom_up
    _freeze(resnet, cfg.MODEL.BACKBONE.FREEZE_AT)
    for key, said in (("RESNETS", cfg.MODEL.RESNETS.NORM), ("FPN", cfg.MODEL.FPN.NORM)):
        if said != norm and (key == "RESNETS" or backbone is not resnet):
            logger.info("The backbone has %s where MODEL.%s.NORM says %r", norm, key, said)
    return backbone


def _freeze(resnet: ResNet, freeze_at: int) -> None:
    resnet.freeze(freeze_at)
    for layer in resnet.modules():
        if isinstance(layer, MABN2d) and not layer.weight.requires_grad:
            layer.freeze()
