"""RetinaNet with a head chosen by name, and heads whose BatchNorm says what a batch is.

The heads are those of arXiv 2105.07576, section 5: a batch is one feature level or all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from rethinking_bn.config import check_has_keys
from rethinking_bn.layers import CycleBatchNorm2d, MultiDomainBatchNorm2d, get_norm
from rethinking_bn.layers.convert import centre_convolutions, replace_norms
from rethinking_bn.layers.layer_by_layer import layer_by_layer
from rethinking_bn.layers.multi_domain import CHOICES, TABLE_5, Choice
from rethinking_bn.modeling.domains import FollowsDomains, check_norms, domain_norm
from rethinking_bn.modeling.norm_head import RequiresStatistics, norm_options

RETINANET_HEAD = Registry("RETINANET_HEAD")
RETINANET_HEAD.__doc__ = """
Registry of heads for RetinaNet, which predict class logits and box deltas from feature maps.

The registered object will be called with `obj(cfg, input_shape)`, where `input_shape` is a list of
:class:`detectron2.layers.ShapeSpec`, one per feature level, high resolution first. It returns an
nn.Module whose forward maps L feature maps (N, C, H_l, W_l) to a list of L logits
(N, A * K, H_l, W_l) and a list of L deltas (N, A * 4, H_l, W_l).
"""
RETINANET_HEAD.register(RetinaNetHead)

logger = logging.getLogger(__name__)

_BN_NAMES = ("BN", "SyncBN")
_OUR_NORMS = ("MABN", "BatchStatBN")  # names that detectron2 does not have
_CHOICES = ("train_stats", "population_stats", "affine")

NormFactory = Callable[[int], nn.Module | None]


def build_retinanet_head(cfg: CfgNode, input_shape: list[ShapeSpec]) -> nn.Module:
    """Build the head that ``cfg.MODEL.RETINANET.HEAD_NAME`` names.

    Raises:
        ValueError: when RETINANET_HEAD has no head of that name.
    """
    name = cfg.MODEL.RETINANET.HEAD_NAME
    if name not in RETINANET_HEAD:
        known = ", ".join(sorted(registered for registered, _ in RETINANET_HEAD))
        raise ValueError(f"MODEL.RETINANET.HEAD_NAME is {name!r}; registered heads: {known}")
    return RETINANET_HEAD.get(name)(cfg, input_shape)


@META_ARCH_REGISTRY.register()
class ConfigurableHeadRetinaNet(FollowsDomains, RetinaNet):
    """detectron2's RetinaNet with the head that ``MODEL.RETINANET.HEAD_NAME`` names.

    With ``HEAD_NAME: RetinaNetHead``, detectron2's own, the model is detectron2's RetinaNet bit for
    bit, and any head leaves the random state as detectron2's would have. The constructor is
    RetinaNet's: from LazyConfig, pass any head as ``head``. Norm layers that know domains follow
    the images' (MODEL.DOMAIN_BN).
    """

    reads = (*FollowsDomains.reads, "MODEL.RETINANET.HEAD_NAME")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return RetinaNet's arguments.

        Raises:
            ValueError: for an unknown head, keys that it refuses or that ``cfg`` lacks, and
                MODEL.DOMAIN_BN with norms that know no domains.
        """
        check_has_keys(cfg)
        if cfg.MODEL.RETINANET.HEAD_NAME == "RetinaNetHead":
            _refuse_choices(cfg)
            arguments = super().from_config(cfg)
        else:
            backbone = build_backbone(cfg)
            shapes = backbone.output_shape()
            head = build_retinanet_head(cfg, [shapes[f] for f in cfg.MODEL.RETINANET.IN_FEATURES])
            # detectron2 reads the other arguments and builds a backbone and a head on the way: both
            # are dropped, and their draws from the random state undone
            stock = cfg.clone()
            stock.defrost()
            stock.MODEL.RETINANET.NORM, stock.MODEL.RETINANET.NUM_CONVS = "", 1
            if cfg.TEST.PRECISE_BN.ENABLED:
                logger.info(
                    "detectron2's own hook for TEST.PRECISE_BN passes over multi-domain layers: "
                    "rethinking_bn.engine's TrainerMixin or with_rethinking_bn replaces it"
                )
            with torch.random.fork_rng(devices=[]):
                arguments = {**super().from_config(stock), "backbone": backbone, "head": head}
        check_norms(cfg, arguments.items())
        return arguments


def _refuse_choices(cfg: CfgNode) -> None:
    """Raise a ValueError for keys that detectron2's own head ignores or does not know."""
    keys = cfg.MODEL.RETINANET
    for name, value in (("NORM", keys.NORM), *((f"BN.{n}", v) for n, v in keys.BN.items())):
        if value and (name != "NORM" or value in _OUR_NORMS):
            raise ValueError(
                f"MODEL.RETINANET.{name} is {value!r}, which detectron2's RetinaNetHead does not "
                "know: set MODEL.RETINANET.HEAD_NAME to MultiDomainBNRetinaNetHead"
            )


@RETINANET_HEAD.register()
class MultiDomainBNRetinaNetHead(RequiresStatistics, RetinaNetHead):
    """detectron2's RetinaNet head with a BatchNorm over all feature levels, layer by layer.

    The L levels are the domains. Parameters, their names and their initialisation are those of
    detectron2's head (same draws from the same random state); each norm layer sees all levels at
    once, so that a synchronised one takes one collective per pass.

    Loading weights of this head without the statistics of one of its norm layers is an error: a
    head trained with another norm, or without, would otherwise start from mean 0 and variance 1.
    ``MODEL.ALLOW_MISSING_STATISTICS True`` is for those who start training from there on purpose.
    """

    reads = ("MODEL.RETINANET.BN", "MODEL.DOMAIN_BN", "MODEL.ALLOW_MISSING_STATISTICS")
    norm_keys = ("MODEL.RETINANET.NORM",)
    #: the choices when none is given
    choices: Mapping[str, Choice] = TABLE_5[1]
    #: whether other choices than these are refused
    is_preset: bool = False
    #: (channels, num_domains=, sync=, and the three choices) -> layer
    norm_layer: Callable[..., nn.Module] = MultiDomainBatchNorm2d

    @configurable
    def __init__(
        self,
        *,
        input_shape: Sequence[ShapeSpec],
        num_classes: int,
        num_anchors: int,
        conv_dims: Sequence[int],
        norm: str | NormFactory | None = "SyncBN",
        train_stats: str = "",
        population_stats: str = "",
        affine: str = "",
        prior_prob: float = 0.01,
        norm_arguments: Mapping[str, Any] | None = None,
        domain_norm: NormFactory | None = None,
        allow_missing_statistics: bool = False,
    ) -> None:
        """
        Args:
            input_shape: one per feature level, all with the same channels.
            num_classes: foreground classes K.
            num_anchors: anchors per location A.
            conv_dims: output channels of each convolution of the two subnets, at least one.
            norm: "BN" (statistics of this rank) or "SyncBN" (pooled over ranks). The general head
                also takes any other name that :func:`rethinking_bn.layers.get_norm` knows, or a
                callable from channels to a layer; those know no domains, so the three choices
                must stay unset. "MABN" has one set of statistics for all levels, one iteration per
                pass, and centres the convolutions, which lose their bias.
            train_stats, population_stats, affine: "shared" (one set for all levels),
                "domain_specific" (one per level) or "" (this class's own); Table 5's columns.
            prior_prob: initial foreground probability of every anchor.
            norm_arguments: keyword arguments of the layers of another norm than "BN" and "SyncBN".
            domain_norm: for data with domains, channels -> a SplitBatchNorm2d that stands for "BN"
                and "SyncBN"; the three choices, which are about levels, must then all be "shared".
            allow_missing_statistics: whether weights without the statistics of a norm layer load;
                those then stay as they are.

        Raises:
            ValueError: for an unknown value, or one that contradicts the class or the norm.
        """
        if not conv_dims:
            raise ValueError("conv_dims (MODEL.RETINANET.NUM_CONVS) must name at least one layer")
        given = dict(zip(_CHOICES, (train_stats, population_stats, affine), strict=True))
        options = norm_arguments or {}
        factory = self._norm_factory(norm, len(input_shape), given, options, domain_norm)
        super().__init__(
            input_shape=list(input_shape),
            num_classes=num_classes,
            num_anchors=num_anchors,
            conv_dims=list(conv_dims),
            norm=factory or "",
            prior_prob=prior_prob,
        )
        self.allow_missing_statistics = allow_missing_statistics
        if norm == "MABN":
            replace_norms(self, norm, **options)
        else:
            centre_convolutions(self)  # for a callable that makes MABN2d
        self.cls_subnet: nn.Sequential = layer_by_layer(self.cls_subnet)
        self.bbox_subnet: nn.Sequential = layer_by_layer(self.bbox_subnet)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Read MODEL.RETINANET, with the three choices from its BN, MODEL.MABN and .DOMAIN_BN.

        Raises:
            ValueError: when ``cfg`` lacks this project's keys.
        """
        check_has_keys(cfg)
        norm = cfg.MODEL.RETINANET.NORM
        return {
            **super().from_config(cfg, input_shape),
            **{name: cfg.MODEL.RETINANET.BN[name.upper()] for name in _CHOICES},
            "norm_arguments": norm_options(cfg, norm),
            "domain_norm": domain_norm(cfg, norm, "MODEL.RETINANET.NORM"),
            "allow_missing_statistics": cfg.MODEL.ALLOW_MISSING_STATISTICS,
        }

    @classmethod
    def _norm_factory(
        cls,
        norm: str | NormFactory | None,
        num_domains: int,
        given: Mapping[str, str],
        options: Mapping[str, Any],
        domain_norm: NormFactory | None,
    ) -> NormFactory | None:
        """Return channels -> layer for the requested norm, or None for no norm."""
        if norm not in _BN_NAMES:
            chosen = [f"{name}={value!r}" for name, value in given.items() if value]
            if cls.is_preset or chosen:
                raise ValueError(
                    f"{cls.__name__}{f' with {chosen[0]}' if chosen else ''} needs the norm "
                    f"(MODEL.RETINANET.NORM) to be one of {', '.join(_BN_NAMES)}; got {norm!r}"
                )
            if norm == "MABN":
                return nn.BatchNorm2d  # stands in until the convolutions can be centred, too
            return (lambda channels: get_norm(norm, channels, **options)) if norm else None
        choices = dict(cls.choices)
        for name, value in given.items():
            key = f"{cls.__name__}: {name} (MODEL.RETINANET.BN.{name.upper()})"
            allowed = (cls.choices[name],) if cls.is_preset else CHOICES
            if value and value not in allowed:
                listed = " or ".join(repr(choice) for choice in (*allowed, ""))
                raise ValueError(f"{key} must be {listed}, got {value!r}")
            choices[name] = cast(Choice, value) or choices[name]
            if domain_norm is not None and choices[name] != "shared":
                raise ValueError(
                    f"{key} is {choices[name]!r}, but with domains in the data "
                    "(MODEL.DOMAIN_BN.DATASETS) the feature levels must share theirs"
                )
        sync = norm == "SyncBN"
        return domain_norm or partial(cls.norm_layer, num_domains=num_domains, sync=sync, **choices)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """
        Args:
            features: L tensors (N, C, H_l, W_l), in the order of ``input_shape``.

        Returns:
            L logits (N, A * K, H_l, W_l) and L box deltas (N, A * 4, H_l, W_l).

        Raises:
            ValueError: when the number of levels is another.
        """
        if len(features) != self._num_features:
            raise ValueError(
                f"the head was built for {self._num_features} feature levels, got {len(features)}"
            )
        logits = [self.cls_score(x) for x in self.cls_subnet(features)]
        deltas = [self.bbox_pred(x) for x in self.bbox_subnet(features)]
        return logits, deltas


@RETINANET_HEAD.register()
class SharedBNRetinaNetHead(MultiDomainBNRetinaNetHead):
    """Row 1 of Table 5: one BatchNorm whose batch is all levels together, in every phase."""

    is_preset = True


@RETINANET_HEAD.register()
class DomainBNRetinaNetHead(MultiDomainBNRetinaNetHead):
    """Row 6 of Table 5: a BatchNorm of its own for every level, affine included."""

    choices = TABLE_5[6]
    is_preset = True


@RETINANET_HEAD.register()
class CycleBNRetinaNetHead(MultiDomainBNRetinaNetHead):
    """Row 4 of Table 5: statistics of its own for every level, one affine.

    Its layers are called once per level, as detectron2's ``CycleBatchNormList`` is, whose
    checkpoints load. A synchronised layer takes one collective per level; the general head with the
    same choices takes one for all.
    """

    choices = TABLE_5[4]
    is_preset = True
    norm_layer = staticmethod(
        lambda c, *, num_domains, sync, **_: CycleBatchNorm2d(c, num_domains, sync=sync)
    )
