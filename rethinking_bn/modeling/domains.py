"""MODEL.DOMAIN_BN: norms of backbone, FPN and RetinaNet's head that follow the data's domains."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN
from torch import nn

from rethinking_bn.data.domains import DOMAIN, domain_groups
from rethinking_bn.layers import SplitBatchNorm2d, row_domains
from rethinking_bn.layers.bn_like import find_bn_like
from rethinking_bn.layers.multi_domain import CHOICES

_EACH_IMAGE_APART = ("", "FrozenBN", "GN", "LN", "IN")


def domain_norm(cfg: CfgNode, norm: str, key: str) -> partial[SplitBatchNorm2d] | None:
    """Return channels -> norm layer that follows the domains of MODEL.DOMAIN_BN.

    None where there are no domains, or the norm takes each image by itself.

    Args:
        cfg, norm, key: the config, a norm's name, and the config key that gives it.

    Raises:
        ValueError: for a norm that mixes images and knows no domains, or an unknown choice.
    """
    groups = domain_groups(cfg)
    if not groups or norm in _EACH_IMAGE_APART:
        return None
    choices: dict[str, Any] = {}
    for name in ("TRAIN_STATS", "POPULATION_STATS", "AFFINE"):
        choices[name.lower()] = choice = cfg.MODEL.DOMAIN_BN[name]
        if choice not in CHOICES:
            raise ValueError(f"MODEL.DOMAIN_BN.{name} must be one of {CHOICES}, got {choice!r}")
    if norm not in ("BN", "SyncBN"):
        raise ValueError(
            f"{key} is {norm!r}, which knows no domains, but MODEL.DOMAIN_BN.DATASETS has "
            f"{len(groups)}: set it to BN or SyncBN, or to a norm that takes each image by itself"
        )
    sync = norm == "SyncBN"
    return partial(SplitBatchNorm2d, num_domains=len(groups), sync=sync, **choices)


def check_architecture(cfg: CfgNode) -> None:
    """Raise a ValueError for domains in a MODEL.META_ARCHITECTURE that does not follow them."""
    name = cfg.MODEL.META_ARCHITECTURE
    if not domain_groups(cfg) or name not in META_ARCH_REGISTRY:
        return
    if "MODEL.DOMAIN_BN" not in getattr(META_ARCH_REGISTRY.get(name), "reads", ()):
        raise ValueError(
            f"MODEL.DOMAIN_BN.DATASETS has {len(domain_groups(cfg))} groups, but {name} does not "
            "tell which image is of which domain: set MODEL.META_ARCHITECTURE to "
            "ConfigurableHeadRetinaNet or DomainRCNN"
        )


def check_norms(cfg: CfgNode, parts: Iterable[tuple[str, Any]]) -> None:
    """Raise a ValueError if the data has domains and a norm knows none, or no norm follows them.

    Of the named ``parts`` of the model, only modules are looked at.
    """
    if not domain_groups(cfg):
        return
    problem = f"MODEL.DOMAIN_BN.DATASETS has {len(domain_groups(cfg))} groups, but"
    follows = False
    for part, module in parts:
        for layer in find_bn_like(module).layers if isinstance(module, nn.Module) else ():
            follows |= isinstance(layer.module, SplitBatchNorm2d)
            if layer.kind != "constant" and not isinstance(layer.module, SplitBatchNorm2d):
                raise ValueError(
                    f"{problem} {part}.{layer.name} is a {type(layer.module).__name__}, which "
                    "knows no domains: backbones of build_norm_*_backbone and RetinaNet heads with "
                    "statistics shared between levels do; others must be FrozenBN, GN, LN, IN or ''"
                )
    if not follows:
        raise ValueError(
            f"{problem} no norm of the model would follow them: set MODEL.BACKBONE.NAME to a "
            "build_norm_*_backbone and MODEL.RESNETS.NORM, MODEL.FPN.NORM or MODEL.RETINANET.NORM "
            "to BN or SyncBN"
        )


class FollowsDomains(nn.Module):
    """Mixin, before a detector of detectron2's, that tells its norms the domain of each image.

    Each input image has it under the key "domain". ``row_domains(model, ...)`` around a call takes
    precedence, to infer by a named domain. A model without SplitBatchNorm2d layers asks for none.
    """

    reads: tuple[str, ...] = ("MODEL.DOMAIN_BN",)

    def __call__(self, batched_inputs: Any, *args: Any) -> Any:
        # not forward, which TorchScript would compile
        layers = [layer for layer in self.modules() if isinstance(layer, SplitBatchNorm2d)]
        if all(layer._rows is not None for layer in layers):
            return super().__call__(batched_inputs, *args)
        unmarked = [str(x.get("file_name", "")) for x in batched_inputs if DOMAIN not in x]
        if unmarked:
            raise ValueError(
                f"an image of the input {unmarked[0]!r} has no {DOMAIN!r}: take the loaders of "
                "rethinking_bn.engine.Trainer, or run the model within `with row_domains(model, "
                "d):`"
            )
        with row_domains(self, [image[DOMAIN] for image in batched_inputs]):
            return super().__call__(batched_inputs, *args)


@META_ARCH_REGISTRY.register()
class DomainRCNN(FollowsDomains, GeneralizedRCNN):
    """detectron2's GeneralizedRCNN whose backbone follows the domains of MODEL.DOMAIN_BN."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return GeneralizedRCNN's arguments; a ValueError as :func:`check_norms`."""
        arguments = super().from_config(cfg)
        check_norms(cfg, arguments.items())
        return arguments
