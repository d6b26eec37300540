"""What every norm layer of a config will do, before training and without data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from rethinking_bn.config import images_per_pass, with_our_keys
from rethinking_bn.engine.check_config import check_batch_size
from rethinking_bn.engine.checks import check_model, without_statistics
from rethinking_bn.engine.load_config import scale_to_ranks
from rethinking_bn.layers import MultiDomainBatchNorm2d
from rethinking_bn.layers.bn_like import BatchNormLike, find_bn_like
from rethinking_bn.shuffle.layers import ShuffledLayers

_OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)
_LEAST = 8  # samples in a normalisation batch; section 4 and Figure 5 of arXiv 2105.07576
_IMAGE = 128  # pixels of the square that is run on torch's meta device


class NormPlan(NamedTuple):
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
        mixed_up: whether training normalises several domains by other statistics than inference.
    """

    name: str
    kind: str
    frozen: bool
    calls: int | None
    nbs: int | None
    pools: str
    inference: str
    mixed_up: bool = False


class Plan(NamedTuple):
    """All norm layers of a config in the model's order, and a sentence per likely mistake."""

    layers: tuple[NormPlan, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        rows: list[tuple[Any, ...]] = [
            ("layer", "kind", "", "calls", "NBS", "pooled over", "inference")
        ]
        for name, kind, frozen, calls, nbs, pools, inference, _ in self.layers:
            state = "frozen" if frozen else ""
            rows.append((name, kind, state, calls or "?", nbs or "-", pools or "-", inference))
        widths = "{:48} {:22} {:7}{:>6} {:>5}  {:14} {}"
        lines = [widths.format(*row) for row in rows]
        lines += [] if self.layers else ["no norm layer"]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


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
    cfg = with_our_keys(cfg)  # those of other projects may lack them
    check_batch_size(cfg, ranks)
    cfg = scale_to_ranks(cfg, ranks)
    model = check_model(cfg, ranks, training=False)
    if model is None:
        raise ValueError(f"{cfg.MODEL.META_ARCHITECTURE} cannot be built without data")
    modules = dict(model.train().named_modules())
    layers = {layer.name: layer for layer in find_bn_like(model).layers}
    norms = {
        name: type(module).__name__
        for name, module in modules.items()
        if name in layers
        or isinstance(module, _OTHER_NORMS)
        or type(module).__name__.startswith("LayerNorm")
    }
    shuffled = tuple(f"{n}." for n, module in modules.items() if isinstance(module, ShuffledLayers))
    calls = _count_calls(cfg, model, norms)
    plans = [
        _plan(cfg, layers[name], calls.get(name), ranks, name.startswith(shuffled))
        if name in layers
        else NormPlan(name, kind, False, calls.get(name), None, "", "each sample's own")
        for name, kind in norms.items()
    ]
    return Plan(tuple(plans), tuple(_warnings(cfg, plans, layers, ranks)))


def _plan(
    cfg: CfgNode, layer: BatchNormLike, calls: int | None, ranks: int, shuffled: bool
) -> NormPlan:
    module, several = layer.module, len(layer.domains) > 1
    kind = type(module).__name__
    if layer.frozen:
        inference = f"{'mini-batch' if layer.by_batch else 'frozen'} statistics"
        return NormPlan(layer.name, kind, True, calls, None, "", inference)
    levels = isinstance(module, MultiDomainBatchNorm2d) and module.train_stats == "shared"
    images = images_per_pass(cfg, ranks) * (ranks if shuffled else 1)
    for part, key in (("roi_heads", "ROI_HEADS"), ("backbone", "BACKBONE")):
        if layer.name.startswith(part) and cfg.MODEL[key].NORM_IMAGES > 0:
            images = min(images, cfg.MODEL[key].NORM_IMAGES)
    if layer.mean_square:
        images = cfg.MODEL.MABN.SIMULATED_BATCH_SIZE
    images *= ranks if layer.pools_ranks else 1
    pools = "+".join(["levels"] * levels + ["ranks"] * layer.pools_ranks)
    inference = "running mean square" if layer.mean_square else "population statistics"
    if layer.by_batch or cfg.TEST.STATISTICS == "batch":
        inference = "mini-batch statistics"
    elif several:
        inference += f" of each of {len(layer.domains)} domains"
    mixed_up = (calls or 1) > 1 and levels == several and not (layer.mean_square or layer.by_batch)
    pools = "shuffled rows" if shuffled else pools
    return NormPlan(layer.name, kind, False, calls, images, pools, inference, mixed_up)


def _count_calls(cfg: CfgNode, model: Any, norms: Iterable[str]) -> dict[str, int]:
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
    with suppress(Exception):  # what cannot run without data has calls unknown
        features = model.backbone(image)
        if hasattr(model, "head"):
            model.head([features[f] for f in cfg.MODEL.RETINANET.IN_FEATURES])
        if hasattr(model, "proposal_generator"):
            model.proposal_generator.rpn_head([features[f] for f in cfg.MODEL.RPN.IN_FEATURES])
    for name, key in (("box", cfg.MODEL.ROI_BOX_HEAD), ("mask", cfg.MODEL.ROI_MASK_HEAD)):
        head = getattr(getattr(model, "roi_heads", None), f"{name}_head", None)
        if head is None or isinstance(head, nn.ModuleList):
            continue
        side = key.POOLER_RESOLUTION
        rows = torch.zeros(2, cfg.MODEL.FPN.OUT_CHANNELS, side, side, device="meta")
        with suppress(Exception), ExitStack() as stack:
            if hasattr(head, "image_rows"):
                stack.enter_context(head.image_rows([2]))
            head.layers(rows) if name == "mask" else head(rows)


def _warnings(
    cfg: CfgNode, plans: list[NormPlan], layers: dict[str, BatchNormLike], ranks: int
) -> Iterator[str]:
    small = [
        plan
        for plan in plans
        if plan.nbs is not None and plan.nbs < _LEAST and not layers[plan.name].mean_square
    ]
    unknown = without_statistics(cfg, layers.values())
    decay = cfg.SOLVER.WEIGHT_DECAY_NORM
    decay = cfg.SOLVER.WEIGHT_DECAY if decay is None else decay
    found: list[tuple[list[NormPlan], str]] = [
        (
            [plan for plan in plans if plan.mixed_up],
            "normalise several domains per forward in training by other statistics than at "
            "inference (row 3's mistake, or rows 2 and 5): set MODEL.RETINANET.BN.TRAIN_STATS and "
            "POPULATION_STATS alike (rows 1, 4 or 6 of Table 5)",
        ),
        (
            small,
            f"have a normalisation batch of {min((p.nbs or 0 for p in small), default=0)} image(s),"
            f" below {_LEAST}: SyncBN, GN or MABN, more images per process, or TEST.STATISTICS "
            "batch",
        ),
        (
            [plan for plan in plans if plan.frozen and not cfg.MODEL.WEIGHTS],
            "are frozen and MODEL.WEIGHTS is empty: mean 0, variance 1 for good; set "
            "MODEL.WEIGHTS, or MODEL.RESNETS.NORM GN or BN",
        ),
        (
            [plan for plan in plans if plan.name in unknown],
            f"have no statistics in {cfg.MODEL.WEIGHTS}, or mean 0 and variance 1: set "
            "TEST.PRECISE_BN.ENABLED True, or load weights with statistics",
        ),
        (
            [plan for plan in plans if decay and not plan.frozen],
            f"have affines that decay by {decay}: set SOLVER.WEIGHT_DECAY_NORM 0.0",
        ),
        (
            [plan for plan in plans if "ranks" in plan.pools and ranks == 1],
            "are SyncBN, but there is one process: they are plain BN",
        ),
    ]
    for named, said in found:
        if named:
            more = f" and {len(named) - 1} more layers" if len(named) > 1 else ""
            yield f"{named[0].name}{more} {said}"
