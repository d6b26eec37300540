"""What every norm layer of a config will do, before training and without data."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from rethinking_bn.checkpoint import read_weights
from rethinking_bn.config import add_rethinking_bn_config, images_per_pass
from rethinking_bn.diagnosis.record import DiagnosedLayer, find_layers
from rethinking_bn.engine.checks import check_batch_size, check_model
from rethinking_bn.engine.load_config import scale_to_ranks
from rethinking_bn.layers import BatchStatNorm2d, MultiDomainBatchNorm2d
from rethinking_bn.shuffle.layers import ShuffledLayers

_OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)
_LEAST = 8  # samples in a normalisation batch; section 4 and Figure 5 of arXiv 2105.07576
_IMAGE = 128  # pixels of the square that is run on torch's meta device


@dataclass(frozen=True)
class NormPlan:
    """One norm layer.

    Attributes:
        name: in the model.
        kind: its class.
        frozen: whether its statistics never change in training.
        calls: tensors it normalises per forward; None where that is not known without data.
        nbs: images whose statistics are mixed; None where no batch is used.
        pools: what is pooled in training: "levels", "ranks", both, "shuffled rows" (as many rows
            as of one rank's images, drawn from those of all), or "".
        inference: the statistics it normalises by at inference.
    """

    name: str
    kind: str
    frozen: bool
    calls: int | None
    nbs: int | None
    pools: str
    inference: str

    def __str__(self) -> str:
        calls = "?" if self.calls is None else str(self.calls)
        return (
            f"{self.name:48} {self.kind:22} {'frozen' if self.frozen else '':7}"
            f"{calls:>6} {self.nbs or '-':>5}  {self.pools or '-':14} {self.inference}"
        )


@dataclass(frozen=True)
class Plan:
    """All norm layers of a config, and what is likely to be a mistake.

    Attributes:
        layers: in the order of the model's modules.
        warnings: a sentence each.
    """

    layers: tuple[NormPlan, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        head = (
            f"{'layer':48} {'kind':22} {'':7}{'calls':>6} {'NBS':>5}  {'pooled over':14} inference"
        )
        lines = [head, *(str(layer) for layer in self.layers)]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines if self.layers else [*lines, "no norm layer"])


def make_plan(cfg: CfgNode, ranks: int = 1) -> Plan:
    """Return what the norm layers of a config will do in training with ``ranks`` processes.

    With SOLVER.REFERENCE_WORLD_SIZE the batch is scaled to them, as detectron2's trainer does. The
    model is built on torch's meta device, without memory or initialisation, and its backbone
    and heads run there once.

    Raises:
        ValueError: when the config makes no model, or as :func:`check_batch_size`.
    """
    if ranks < 1:
        raise ValueError(f"a plan needs at least one process, got {ranks}")
    cfg = cfg.clone()
    cfg.defrost()
    add_rethinking_bn_config(cfg)  # those of other projects may lack our keys
    check_batch_size(cfg, ranks)
    cfg = scale_to_ranks(cfg, ranks)
    images = images_per_pass(cfg, ranks)
    model = check_model(cfg, ranks, training=False)
    if model is None:
        raise ValueError(f"{cfg.MODEL.META_ARCHITECTURE} cannot be built without data")
    model.train()
    like_bn = {layer.name: layer for layer in find_layers(model)[0]}
    others = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _OTHER_NORMS) or type(module).__name__.startswith("LayerNorm")
    }
    calls = _count_calls(cfg, model, [*like_bn, *others])
    shuffled = _inside(model, ShuffledLayers)
    plans: list[NormPlan] = []
    for name, _ in model.named_modules():
        if name in like_bn:
            together = images * (ranks if name in shuffled else 1)
            plan = _plan(cfg, like_bn[name], calls, together, ranks)
            plans.append(replace(plan, pools="shuffled rows") if name in shuffled else plan)
        elif name in others:
            kind = type(others[name]).__name__
            count = calls.get(name)
            plans.append(NormPlan(name, kind, False, count, None, "", "each sample's own"))
    return Plan(tuple(plans), tuple(_warnings(cfg, plans, like_bn, ranks)))


def _inside(model: nn.Module, kind: type) -> set[str]:
    """Return the names of all modules inside modules of a kind."""
    outer = [name for name, module in model.named_modules() if isinstance(module, kind)]
    return {
        f"{name}.{inner}"
        for name in outer
        for inner, _ in model.get_submodule(name).named_modules()
    }


def _plan(
    cfg: CfgNode, layer: DiagnosedLayer, calls: dict[str, int], images: int, ranks: int
) -> NormPlan:
    module = layer.layer
    together = images
    for prefix, key in (("roi_heads", "ROI_HEADS"), ("backbone", "BACKBONE")):
        limit = cfg.MODEL[key].NORM_IMAGES
        if layer.name.startswith(prefix) and limit > 0:
            together = min(images, limit)
    over_ranks = "SyncBatchNorm" in type(module).__name__ or getattr(module, "sync", False)
    levels = isinstance(module, MultiDomainBatchNorm2d) and module.train_stats == "shared"
    if layer.mean_square:
        together = cfg.MODEL.MABN.SIMULATED_BATCH_SIZE
    inference = "population statistics"
    if isinstance(module, BatchStatNorm2d) or cfg.TEST.STATISTICS == "batch":
        inference = "mini-batch statistics"
    elif layer.frozen:
        inference = "frozen statistics"
    elif layer.rows > 1:
        inference = f"population statistics of each of {layer.rows} domains"
    elif layer.mean_square:
        inference = "running mean square"
    pools = [name for name, is_so in (("levels", levels), ("ranks", over_ranks)) if is_so]
    return NormPlan(
        layer.name,
        type(module).__name__,
        layer.frozen,
        calls.get(layer.name),
        None if layer.frozen else together * (ranks if over_ranks else 1),
        "" if layer.frozen else "+".join(pools),
        inference,
    )


def _count_calls(cfg: CfgNode, model: Any, norms: Sequence[str]) -> dict[str, int]:
    """Run backbone and heads on the meta device; return the tensors each norm layer is given.

    The model is of no use afterwards: its norm layers only count.
    """
    calls: dict[str, int] = {}

    def count(name: str, x: Any) -> Any:
        calls[name] = calls.get(name, 0) + (1 if isinstance(x, Tensor) else len(x))
        return x

    for module in model.modules():
        module.training = False
    for name in norms:
        model.get_submodule(name).forward = partial(count, name)
    with torch.no_grad():
        _run_parts(cfg, model)
    return calls


def _run_parts(cfg: CfgNode, model: Any) -> None:
    image = torch.zeros(1, 3, _IMAGE, _IMAGE, device="meta")
    with contextlib.suppress(Exception):  # what cannot run without data has calls unknown
        features = model.backbone(image)
        if hasattr(model, "head"):
            model.head([features[f] for f in cfg.MODEL.RETINANET.IN_FEATURES])
        if hasattr(model, "proposal_generator"):
            model.proposal_generator.rpn_head([features[f] for f in cfg.MODEL.RPN.IN_FEATURES])
    for name, key in (("box", cfg.MODEL.ROI_BOX_HEAD), ("mask", cfg.MODEL.ROI_MASK_HEAD)):
        head = getattr(getattr(model, "roi_heads", None), f"{name}_head", None)
        channels = cfg.MODEL.FPN.OUT_CHANNELS
        if head is None or isinstance(head, nn.ModuleList):
            continue
        side = key.POOLER_RESOLUTION
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(Exception))
            if hasattr(head, "image_rows"):
                stack.enter_context(head.image_rows([2]))
            rows = torch.zeros(2, channels, side, side, device="meta")
            head.layers(rows) if name == "mask" else head(rows)


def _warnings(
    cfg: CfgNode, plans: list[NormPlan], layers: dict[str, DiagnosedLayer], ranks: int
) -> Iterator[str]:
    moving = [plan for plan in plans if plan.nbs is not None]
    mistaken = []
    for plan in moving:
        layer = layers[plan.name]
        at_odds = layer.rows == 1 if layer.apart else layer.rows > 1 and not layer.mean_square
        if (plan.calls or 1) > 1 and at_odds and not layer.by_batch:
            mistaken.append(plan)
    if mistaken:
        yield (
            f"{_names(mistaken)} normalise {mistaken[0].calls} domains per forward in training by "
            "other statistics than at inference (row 3's mistake, or rows 2 and 5): set "
            "MODEL.RETINANET.BN.TRAIN_STATS and POPULATION_STATS alike (rows 1, 4 or 6 of Table 5)"
        )
    small = [p for p in moving if (p.nbs or 0) < _LEAST and not layers[p.name].mean_square]
    if small:
        yield (
            f"{_names(small)} have a normalisation batch of {min(p.nbs or 0 for p in small)} "
            f"image(s), below {_LEAST}: SyncBN, GN or MABN, more images per process, or "
            "TEST.STATISTICS batch"
        )
    yield from _identity(cfg, plans, layers)
    decay = cfg.SOLVER.WEIGHT_DECAY_NORM
    decay = cfg.SOLVER.WEIGHT_DECAY if decay is None else decay
    if decay and any(not plan.frozen for plan in plans):
        yield f"the affines of norm layers decay by {decay}: set SOLVER.WEIGHT_DECAY_NORM 0.0"
    synced = [plan for plan in moving if "ranks" in plan.pools]
    if synced and ranks == 1:
        yield f"{_names(synced)} are SyncBN, but there is one process: they are plain BN"


def _identity(
    cfg: CfgNode, plans: list[NormPlan], layers: dict[str, DiagnosedLayer]
) -> Iterator[str]:
    path = cfg.MODEL.WEIGHTS
    frozen = [plan for plan in plans if plan.frozen]
    if not path:
        if frozen:
            yield (
                f"{_names(frozen)} are frozen and MODEL.WEIGHTS is empty: mean 0, variance 1 for "
                "good; set MODEL.WEIGHTS, or MODEL.RESNETS.NORM GN or BN"
            )
        return
    if not (path.endswith(".pth") and os.path.isfile(path)):
        return  # names are matched to weights in other formats only when they are loaded
    try:
        state = read_weights(path)
    except ValueError as error:
        raise ValueError(f"MODEL.WEIGHTS: {error}") from error
    without = []
    for plan in plans:
        if plan.name not in layers or layers[plan.name].stored is None:
            continue
        keys = [key for key in state if key.startswith(f"{plan.name}.")]
        means = [state[k] for k in keys if k.endswith("running_mean")]
        squares = [state[k] for k in keys if k.endswith("running_mean_square")]
        known = any(bool((m != 0).any()) for m in means) or any(
            bool((s != 1).any()) for s in squares
        )
        if not known:
            without.append(plan)
    if without:
        yield (
            f"{_names(without)} have no statistics in {path}, or mean 0 and variance 1: set "
            "TEST.PRECISE_BN.ENABLED True, or load weights with statistics"
        )


def _names(plans: list[NormPlan]) -> str:
    first = plans[0].name
    return first if len(plans) == 1 else f"{first} and {len(plans) - 1} more layers"
