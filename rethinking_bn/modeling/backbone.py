"""detectron2's ResNets and FPNs with any norm, as the keys say or GN or MABN throughout.

Registered are build_norm_resnet_backbone, build_norm_resnet_fpn_backbone and
build_norm_retinanet_resnet_fpn_backbone (see :func:`build_with_norms`), and the same three with
"gn" or "mabn" for "norm", which have GN or MABN throughout, whatever the keys say.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import (
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)
from torch import nn

from rethinking_bn.config import check_has_keys
from rethinking_bn.layers import BatchNorm2d, MABN2d, SplitBatchNorm2d, SyncBatchNorm2d
from rethinking_bn.layers.convert import replace_norms
from rethinking_bn.modeling.domains import check_architecture, domain_norm
from rethinking_bn.modeling.norm_head import NORM_OPTIONS, check_norm, norm_options

logger = logging.getLogger(__name__)

# no norm, and detectron2's own FrozenBN, which loads weights of all ages
_STOCK = ("", "FrozenBN")
# which pool more, or less, than the images of a rank
_POOLS = (SyncBatchNorm2d, MABN2d, SplitBatchNorm2d)

Builder = Callable[[CfgNode, ShapeSpec], Backbone]


def build_with_norms(
    builder: Builder, cfg: CfgNode, input_shape: ShapeSpec, preset: str | None = None
) -> Backbone:
    """Build one of detectron2's backbones with our norms in every place that may have one.

    MODEL.RESNETS.NORM is for the stem, the blocks and the shortcuts, MODEL.FPN.NORM for the FPN's
    lateral and output convolutions. RetinaNet's P6 and P7 have none, as in detectron2 (MABN's
    authors do not name them either). The first MODEL.BACKBONE.FREEZE_AT stages are frozen: no
    gradients, FrozenBN in place of BN, and MABN keeps its statistics. MODEL.BACKBONE.NORM_IMAGES
    makes BN normalise so many images at a time, and MODEL.DOMAIN_BN lets BN and SyncBN follow the
    domains of the images. All other keys keep their meaning.

    Args:
        builder, cfg, input_shape: of detectron2's registry, and its arguments.
        preset: a norm for both, in place of the keys.

    Raises:
        ValueError: for a norm that :func:`rethinking_bn.layers.get_norm` does not know; for
            deformable stages with MABN, which cannot centre their convolutions; for channels that
            GN's groups do not divide; for NORM_IMAGES, MODEL.DOMAIN_BN or MODEL.MABN with norms
            that they do not fit.
    """
    check_has_keys(cfg)
    check_architecture(cfg)
    norms = {key: preset or cfg.MODEL[key].NORM for key in ("RESNETS", "FPN")}
    for key, norm in norms.items():
        check_norm(f"MODEL.{key}.NORM", norm)
    if norms["RESNETS"] == "MABN" and any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE):
        raise ValueError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE}, but "
            "MABN needs convolutions with centred filters, which deformable ones do not have: "
            "set it to [False, False, False, False] or take a GN backbone"
        )
    stock = cfg.clone()
    stock.defrost()
    for key, norm in norms.items():
        stock.MODEL[key].NORM = norm if norm in _STOCK else "BN"  # which is then replaced
    stock.MODEL.BACKBONE.FREEZE_AT = 0  # after the conversion: detectron2 freezes by replacing BN
    backbone = builder(stock, input_shape)
    resnet = backbone if isinstance(backbone, ResNet) else backbone.bottom_up
    keys = ("RESNETS",) if backbone is resnet else ("RESNETS", "FPN")
    if len({norms[key] for key in keys}) == 1:
        _replace(backbone, norms["RESNETS"], "RESNETS", cfg)
    else:
        _replace(resnet, norms["RESNETS"], "RESNETS", cfg)
        backbone.bottom_up = nn.Identity()  # not to be seen twice
        _replace(backbone, norms["FPN"], "FPN", cfg)
        backbone.bottom_up = resnet
    for key in keys:
        if (configured := cfg.MODEL[key].NORM) != norms[key]:
            logger.info("The backbone has %s where MODEL.%s.NORM says %r", preset, key, configured)
    _freeze(resnet, cfg.MODEL.BACKBONE.FREEZE_AT)
    _normalize_images(backbone, cfg.MODEL.BACKBONE.NORM_IMAGES)
    return backbone


def _register(builder: Builder, prefix: str, preset: str | None) -> None:
    def build(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
        return build_with_norms(builder, cfg, input_shape, preset)

    build.__name__ = builder.__name__.replace("build_", f"build_{prefix}_")
    options: Any = build
    options.reads = ("MODEL.BACKBONE.NORM_IMAGES", "MODEL.DOMAIN_BN")
    options.norm_keys = () if preset else ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM")
    if preset:
        options.reads += (NORM_OPTIONS[preset],)
    BACKBONE_REGISTRY.register(build)


for _builder in (
    build_resnet_backbone,
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
):
    for _prefix, _preset in (("norm", None), ("gn", "GN"), ("mabn", "MABN")):
        _register(_builder, _prefix, _preset)


def _replace(part: nn.Module, norm: str, key: str, cfg: CfgNode) -> None:
    follows_domains = domain_norm(cfg, norm, f"MODEL.{key}.NORM")
    if follows_domains is not None:
        replace_norms(part, follows_domains)
    elif norm not in _STOCK:
        replace_norms(part, norm, **norm_options(cfg, norm))


def _freeze(resnet: ResNet, freeze_at: int) -> None:
    resnet.freeze(freeze_at)  # detectron2's, which replaces BN alone
    for layer in resnet.modules():
        if isinstance(layer, (MABN2d, SplitBatchNorm2d)):
            if not any(p.requires_grad for p in layer.parameters()):
                layer.freeze()


def _normalize_images(backbone: nn.Module, images: int) -> None:
    """Let every BN normalise so many images at a time; 0: all of them."""
    key = f"MODEL.BACKBONE.NORM_IMAGES is {images}"
    if images < 0:
        raise ValueError(f"{key} < 0")
    norms: list[Any] = [m for m in backbone.modules() if isinstance(m, (BatchNorm2d, *_POOLS))]
    for norm in norms if images else ():
        if isinstance(norm, _POOLS):
            raise ValueError(
                f"{key}, but {type(norm).__name__} knows no groups of images: set it to 0, or "
                "MODEL.RESNETS.NORM and MODEL.FPN.NORM to BN or BatchStatBN (without "
                "MODEL.DOMAIN_BN)"
            )
        norm.rows_at_a_time = images
    if images and not norms:
        raise ValueError(f"{key}, but no norm of the backbone normalises several images together")
