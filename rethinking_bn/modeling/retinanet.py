"""RetinaNet with a head chosen by name."""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch import RetinaNet

from rethinking_bn.config import check_has_keys
from rethinking_bn.modeling.domains import FollowsDomains, check_norms
from rethinking_bn.modeling.retinanet_head import build_retinanet_head

logger = logging.getLogger(__name__)

_OUR_NORMS = ("MABN", "BatchStatBN")  # names that detectron2 does not have


@META_ARCH_REGISTRY.register()
class ConfigurableHeadRetinaNet(FollowsDomains, RetinaNet):
    """detectron2's RetinaNet with the head that ``MODEL.RETINANET.HEAD_NAME`` names.

    With ``HEAD_NAME: RetinaNetHead``, detectron2's own, the model is detectron2's RetinaNet bit for
    bit, and so is the random state after building it. Any other head is built from the random state
    that detectron2's would have been built from. The constructor is RetinaNet's: from LazyConfig,
    pass any head as ``head``. Images' domains are followed where norm layers know them
    (MODEL.DOMAIN_BN, see :func:`~rethinking_bn.modeling.domains.follow_domains`).
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return RetinaNet's arguments.

        Raises:
            ValueError: when no head of that name is registered, the head refuses its keys, or
                ``cfg`` lacks this project's; for MODEL.DOMAIN_BN with norms that know no domains.
        """
        check_has_keys(cfg)
        if cfg.MODEL.RETINANET.HEAD_NAME == "RetinaNetHead":
            _refuse_choices(cfg)
            arguments = super().from_config(cfg)
            check_norms(cfg, arguments.items())
            return arguments
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        head = build_retinanet_head(cfg, [shapes[f] for f in cfg.MODEL.RETINANET.IN_FEATURES])
        # The other arguments are read by detectron2, which builds a backbone and a head on the way;
        # both are dropped, and their draws from the random state undone.
        stock = cfg.clone()
        stock.defrost()
        stock.MODEL.RETINANET.NORM = ""
        stock.MODEL.RETINANET.NUM_CONVS = 1
        if cfg.TEST.PRECISE_BN.ENABLED:
            logger.info(
                "TEST.PRECISE_BN is on. detectron2's own hook knows torch's BatchNorm classes only "
                "and passes over multi-domain layers: rethinking_bn.engine's Trainer trains their "
                "population statistics, and so does another trainer with its with_rethinking_bn."
            )
        with torch.random.fork_rng(devices=[]):
            arguments = super().from_config(stock)
        arguments |= {"backbone": backbone, "head": head}
        check_norms(cfg, arguments.items())
        return arguments


def _refuse_choices(cfg: CfgNode) -> None:
    """Raise a ValueError for keys that detectron2's own head ignores or does not know."""
    norm = cfg.MODEL.RETINANET.NORM
    if norm in _OUR_NORMS:
        raise ValueError(
            f"MODEL.RETINANET.NORM is {norm!r}, which detectron2's RetinaNetHead does not know; "
            "set MODEL.RETINANET.HEAD_NAME to MultiDomainBNRetinaNetHead"
        )
    for name, value in cfg.MODEL.RETINANET.BN.items():
        if value:
            raise ValueError(
                f"MODEL.RETINANET.BN.{name} is {value!r}, but the head is detectron2's "
                "RetinaNetHead, which knows no such choice; set MODEL.RETINANET.HEAD_NAME to "
                "MultiDomainBNRetinaNetHead"
            )
