"""What every norm layer of a config will do, before training and without data."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.layers.batch_norm import LayerNorm
from torch import Tensor, nn

from rethinking_bn.checkpoint import read_weights
from rethinking_bn.config import images_per_pass, with_our_keys
from rethinking_bn.engine.check_config import check_batch_size
from rethinking_bn.engine.checks import check_model
from rethinking_bn.engine.load_config import scale_to_ranks
from rethinking_bn.layers import MultiDomainBatchNorm2d
from rethinking_bn.layers.bn_like import BatchNormLike, find_bn_like
from rethinking_bn.shuffle.layers import ShuffledLayers

_OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, LayerNorm, nn.InstanceNorm2d)
_LEAST = 8  # samples in a normalisation batch; section 4 and Figure 5 of arXiv 2105.07576
_IMAGE = 128  # pixels of the square that is run on torch's meta device


class NormPlan(NamedTuple):
    """One norm layer: its name in the model, its class, and what it does.

    Attributes:
        calls: tensors it normalises per forward; None where that is not known without data.
        frozen: whether its statistics never change in training.
        nbs: images whose statistics are mixed; None where no batch is used.
        pools: what is pooled in training: "levels", "ranks", both, "shuffled rows" (as many rows
            as of one rank's images, drawn from those of all), or "".
        inference: the statistics it normalises by at inference.
        mistakes: what is likely to be wrong; the words hold for other layers, too.
    """

    name: str
    kind: str
    calls: int | None
    frozen: bool = False
    nbs: int | None = None
    pools: str = ""
    inference: str = "each sample's own"
    mistakes: tuple[str, ...] = ()


class Plan(NamedTuple):
    """All norm layers of a config in the model's order."""

    layers: tuple[NormPlan, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence per likely mistake."""
        named: dict[str, list[str]] = {}
        for layer in self.layers:
            for mistake in layer.mistakes:
                named.setdefault(mistake, []).append(layer.name)
        return tuple(
            f"{first}{f' and {len(others)} more layers' if others else ''} {mistake}"
            for mistake, (first, *others) in named.items()
        )

    def __str__(self) -> str:
        line = "{:48} {:22} {:7}{:>6} {:>5}  {:14} {}".format
        lines = [line("layer", "kind", "", "calls", "NBS", "pooled over", "inference")]
        for name, kind, calls, frozen, nbs, pools, inference, _ in self.layers:
            state = "frozen" if frozen else ""
            lines.append(line(name, kind, state, calls or "?", nbs or "-", pools or "-", inference))
        lines += [] if self.layers else ["no norm layer"]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def make_plan(cfg: CfgNode, ranks: int = 1) -> Plan:
    """Return what the norm layers of a config will do in training with ``ranks`` processes.

    With SOLVER.REFERENCE_WORLD_SIZE the batch is scaled to them, as detectron2's trainer does.

    Raises:
        ValueError: when the config makes no model or names unreadable weights, or as
            :func:`check_batch_size`.
    """
    if ranks < 1:
        raise ValueError(f"a plan needs at least one process, got {ranks}")
    cfg = with_our_keys(cfg)  # those of other projects may lack them
    check_batch_size(cfg, ranks)
    cfg = scale_to_ranks(cfg, ranks)
    model = check_model(cfg, ranks, training=False)
    if model is None:
        raise ValueError(f"{cfg.MODEL.META_ARCHITECTURE} cannot be built without data")
    layers = {layer.name: layer for layer in find_bn_like(model.train()).layers}
    modules = dict(model.named_modules())
    norms = {
        name: type(module).__name__
        for name, module in modules.items()
        if name in layers or isinstance(module, _OTHER_NORMS)
    }
    shuffled = tuple(f"{n}." for n, module in modules.items() if isinstance(module, ShuffledLayers))
    calls, state = _count_calls(cfg, model, norms), _weights(cfg)
    plans = (
        _plan(cfg, layers[name], calls.get(name), ranks, name.startswith(shuffled), state)
        if name in layers
        else NormPlan(name, kind, calls.get(name))
        for name, kind in norms.items()
    )
    return Plan(tuple(plans))


def _weights(cfg: CfgNode) -> dict[str, Any] | None:
    """Return what MODEL.WEIGHTS holds, if it is a .pth that is there."""
    path = cfg.MODEL.WEIGHTS
    if not (path.endswith(".pth") and os.path.isfile(path)):
        return None
    try:
        return read_weights(path)
    except ValueError as error:
        raise ValueError(f"MODEL.WEIGHTS: {error}") from error


def _is_new(layer: BatchNormLike, state: dict[str, Any]) -> bool:
    """Return whether weights leave a layer at the statistics that it was created with."""
    start = {"running_mean": 0.0, "running_mean_square": 1.0}
    own = {k.rpartition(".")[2]: v for k, v in state.items() if k.startswith(f"{layer.name}.")}
    changed = any(bool((own[key] != value).any()) for key, value in start.items() if key in own)
    return layer.keeps_statistics and not changed


def _plan(
    cfg: CfgNode, layer: BatchNormLike, calls: int | None, ranks: int, shuffled: bool, state: Any
) -> NormPlan:
    module, domains, frozen = layer.module, len(layer.domains), bool(layer.frozen)
    levels = isinstance(module, MultiDomainBatchNorm2d) and module.train_stats == "shared"
    images = images_per_pass(cfg, ranks) * (ranks if shuffled else 1)
    for part, key in (("roi_heads", "ROI_HEADS"), ("backbone", "BACKBONE")):
        if layer.name.startswith(part) and cfg.MODEL[key].NORM_IMAGES > 0:
            images = min(images, cfg.MODEL[key].NORM_IMAGES)
    if layer.mean_square:
        images = cfg.MODEL.MABN.SIMULATED_BATCH_SIZE
    images *= ranks if layer.pools_ranks else 1
    pools = "+".join(["levels"] * levels + ["ranks"] * layer.pools_ranks)
    pools = "shuffled rows" if shuffled else pools
    inference = "running mean square" if layer.mean_square else "population statistics"
    if frozen:
        images, pools, inference = 0, "", "frozen statistics"
    elif domains > 1:
        inference += f" of each of {domains} domains"
    if layer.by_batch or (cfg.TEST.STATISTICS == "batch" and not frozen):
        inference = "mini-batch statistics"
    decay = cfg.SOLVER.WEIGHT_DECAY_NORM
    decay = cfg.SOLVER.WEIGHT_DECAY if decay is None else decay
    mistakes = {
        "normalise several domains per forward in training by other statistics than at inference "
        "(row 3's mistake, or rows 2 and 5): set MODEL.RETINANET.BN.TRAIN_STATS and "
        "POPULATION_STATS alike (rows 1, 4 or 6 of Table 5)": (calls or 1) > 1
        and levels == (domains > 1)
        and not (layer.mean_square or layer.by_batch or frozen),
        f"have a normalisation batch of {images} image(s), below {_LEAST}: SyncBN, GN or MABN, "
        "more images per process, or TEST.STATISTICS batch": images < _LEAST
        and not (layer.mean_square or frozen),
        "are frozen and MODEL.WEIGHTS is empty: mean 0, variance 1 for good; set MODEL.WEIGHTS, or "
        "MODEL.RESNETS.NORM GN or BN": frozen and not cfg.MODEL.WEIGHTS,
        "are SyncBN, but there is one process: they are plain BN": layer.pools_ranks and ranks == 1,
        f"have no statistics in {cfg.MODEL.WEIGHTS}, or mean 0 and variance 1: set "
        "TEST.PRECISE_BN.ENABLED True, or load weights with statistics": state is not None
        and _is_new(layer, state),
        f"have affines that decay by {decay}: set SOLVER.WEIGHT_DECAY_NORM 0.0": decay
        and not frozen,
    }
    wrong = tuple(said for said, holds in mistakes.items() if holds)
    kind = type(module).__name__
    return NormPlan(layer.name, kind, calls, frozen, images or None, pools, inference, wrong)


def _count_calls(cfg: CfgNode, model: Any, norms: Iterable[str]) -> dict[str, int]:
    """Run the model but its RoI heads on the meta device; return each norm layer's tensors.

    The model is of no use afterwards: its norm layers only count.
    """
    calls = {name: 1 for name in norms if name.startswith("roi_heads")}

    def count(name: str, x: Any) -> Any:
        calls[name] = calls.get(name, 0) + (1 if isinstance(x, Tensor) else len(x))
        return x

    for module in model.modules():
        module.training = False
    for name in norms:
        model.get_submodule(name).forward = partial(count, name)
    image = torch.zeros(1, 3, _IMAGE, _IMAGE, device="meta")
    with torch.no_grad(), suppress(Exception):  # what cannot run without data has calls unknown
        features = model.backbone(image)
        if hasattr(model, "head"):
            model.head([features[f] for f in cfg.MODEL.RETINANET.IN_FEATURES])
        if hasattr(model, "proposal_generator"):
            model.proposal_generator.rpn_head([features[f] for f in cfg.MODEL.RPN.IN_FEATURES])
    return calls
