"""MODEL.DOMAIN_BN: norms of backbone, FPN and RetinaNet's head that follow the data's domains."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rethinking_bn.data.domains import DOMAIN, domain_groups
from rethinking_bn.layers import PopulationLayer, SplitBatchNorm2d, row_domains
from rethinking_bn.layers.domain_state import CHOICES

_EACH_IMAGE_APART = ("", "FrozenBN", "GN", "LN", "IN")


def domain_norm(cfg: CfgNode, norm: str, key: str) -> partial[SplitBatchNorm2d] | None:
    """Return what makes a norm layer that follows the domains from its number of channels.

    Args:
        cfg: with MODEL.DOMAIN_BN.
        norm: a name that :func:`rethinking_bn.layers.get_norm` knows.
        key: the config key that names it, for the message.

    Returns:
        None where there are no domains, or the norm takes each image by itself.

    Raises:
        ValueError: for a norm that mixes images and knows no domains, or an unknown choice.
    """
    groups = domain_groups(cfg)
    if not groups or norm in _EACH_IMAGE_APART:
        return None
    keys = ("TRAIN_STATS", "POPULATION_STATS", "AFFINE")
    choices: dict[str, Any] = {name: cfg.MODEL.DOMAIN_BN[name] for name in keys}
    for name, choice in choices.items():
        if choice not in CHOICES:
            raise ValueError(f"MODEL.DOMAIN_BN.{name} must be one of {CHOICES}, got {choice!r}")
    if norm not in ("BN", "SyncBN"):
        raise ValueError(
            f"{key} is {norm!r}, which knows no domains, but MODEL.DOMAIN_BN.DATASETS has "
            f"{len(groups)}: set it to BN or SyncBN, or to a norm that takes each image by itself"
        )
    return partial(
        SplitBatchNorm2d,
        num_domains=len(groups),
        sync=norm == "SyncBN",
        **{name.lower(): choice for name, choice in choices.items()},
    )


def check_architecture(cfg: CfgNode) -> None:
    """Raise a ValueError for domains in a MODEL.META_ARCHITECTURE that does not follow them."""
    name = cfg.MODEL.META_ARCHITECTURE
    if not domain_groups(cfg) or name not in META_ARCH_REGISTRY:
        return
    if not getattr(META_ARCH_REGISTRY.get(name), "follows_domains", False):
        raise ValueError(
            f"MODEL.DOMAIN_BN.DATASETS has {len(domain_groups(cfg))} groups, but {name} does not "
            "tell which image is of which domain: set MODEL.META_ARCHITECTURE to "
            "ConfigurableHeadRetinaNet or DomainRCNN"
        )


def check_norms(cfg: CfgNode, parts: Iterable[tuple[str, Any]]) -> None:
    """Raise a ValueError for a model with domains of which a norm does not know, or none does.

    Args:
        cfg: with MODEL.DOMAIN_BN.
        parts: names and parts of the model; what is no module is passed over.
    """
    if not domain_groups(cfg):
        return
    said = f"MODEL.DOMAIN_BN.DATASETS has {len(domain_groups(cfg))} groups, but"
    knows = False
    for part, module in parts:
        for name, layer in module.named_modules() if isinstance(module, nn.Module) else ():
            if isinstance(layer, SplitBatchNorm2d):
                knows = True
            elif isinstance(layer, (_BatchNorm, PopulationLayer)):
                raise ValueError(
                    f"{said} {part}.{name} is a {type(layer).__name__}, which knows no domains: "
                    "backbones of build_norm_*_backbone and RetinaNet heads with statistics shared "
                    "between levels do; other norms must be FrozenBN, GN, LN, IN or none"
                )
    if not knows:
        raise ValueError(
            f"{said} no norm of the model would follow them: set MODEL.BACKBONE.NAME to a "
            "build_norm_*_backbone and MODEL.RESNETS.NORM, MODEL.FPN.NORM or MODEL.RETINANET.NORM "
            "to BN or SyncBN"
        )


def follow_domains(model: nn.Module) -> nn.Module:
    """Let a detector take each image's domain from its input, under the key "domain".

    ``row_domains(model, ...)`` around a call takes precedence, to infer by a named domain. Nothing
    is changed in a model without SplitBatchNorm2d layers.

    Args:
        model: is called with detectron2's list of dicts.
    """
    if any(isinstance(layer, SplitBatchNorm2d) for layer in model.modules()):
        model.register_forward_pre_hook(_tell)
        model.register_forward_hook(_forget, always_call=True)
    return model


def _tell(model: nn.Module, args: tuple[Any, ...]) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, SplitBatchNorm2d)]
    if all(layer._rows is not None for layer in layers):
        return
    unmarked = [str(image.get("file_name", "")) for image in args[0] if DOMAIN not in image]
    if unmarked:
        raise ValueError(
            f"an image of the input {unmarked[0]!r} has no {DOMAIN!r}: take the loaders of "
            "rethinking_bn.engine.Trainer, or run the model within `with row_domains(model, d):`"
        )
    context = row_domains(model, [image[DOMAIN] for image in args[0]])
    context.__enter__()
    model.__dict__["_domains_told"] = context


def _forget(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    context = model.__dict__.pop("_domains_told", None)
    if context is not None:
        context.__exit__(None, None, None)


class FollowsDomains(nn.Module):
    """What an architecture whose norms follow the images' domains has before detectron2's."""

    follows_domains = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        follow_domains(self)


@META_ARCH_REGISTRY.register()
class DomainRCNN(FollowsDomains, GeneralizedRCNN):
    """detectron2's GeneralizedRCNN whose backbone follows the domains of MODEL.DOMAIN_BN."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return GeneralizedRCNN's arguments.

        Raises:
            ValueError: as :func:`check_norms`.
        """
        arguments = super().from_config(cfg)
        check_norms(cfg, arguments.items())
        return arguments
