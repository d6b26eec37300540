"""One line that puts every hook of ours which a config enables at its place among detectron2's."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine import hooks as detectron2_hooks
from detectron2.utils import comm
from torch import nn

from rethinking_bn.config import check_has_keys, check_thaw
from rethinking_bn.engine.diagnose_bn import DiagnoseBN
from rethinking_bn.engine.freeze_bn import FreezeBN
from rethinking_bn.engine.merge_statistics import MergeStatistics
from rethinking_bn.engine.population_loader import build_together
from rethinking_bn.engine.precise_bn import PreciseBN
from rethinking_bn.engine.unread_keys import warn_of_unread_keys
from rethinking_bn.engine.weight_average import WeightAverage, average_options
from rethinking_bn.population import layers_to_estimate

logger = logging.getLogger(__name__)

PopulationLoader = Callable[[], Iterable[Any]]  # built on the first call, on all ranks

# detectron2's hooks that read the statistics, and so come after what changes them
_READERS = (
    detectron2_hooks.PeriodicCheckpointer,
    detectron2_hooks.BestCheckpointer,
    detectron2_hooks.EvalHook,
    detectron2_hooks.PeriodicWriter,
)


def _precise_bn(cfg: Any, model: nn.Module, loader: PopulationLoader) -> HookBase | None:
    if not cfg.TEST.PRECISE_BN.ENABLED:
        return None
    check_thaw(cfg)
    if not PreciseBN.has_layers(model):
        return None
    return PreciseBN(cfg.TEST.EVAL_PERIOD, model, loader(), cfg.TEST.PRECISE_BN.NUM_ITER)


def _weight_average(cfg: Any, model: nn.Module, loader: PopulationLoader) -> HookBase | None:
    options = average_options(cfg)
    if options is None:
        return None
    if options["statistics"] == "estimate":
        if layers_to_estimate(model):
            options.update(data_loader=loader(), num_iter=cfg.TEST.PRECISE_BN.NUM_ITER)
        else:
            logger.info("The average's statistics are the model's: no BN-like layer to estimate.")
            options["statistics"] = "copy"
    return WeightAverage(
        model,
        checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
        eval_period=cfg.TEST.EVAL_PERIOD,
        output_dir=cfg.OUTPUT_DIR,
        **options,
    )


def _freeze_bn(cfg: Any, model: nn.Module, loader: PopulationLoader) -> HookBase | None:
    keys = cfg.SOLVER.get("FREEZE_BN", {})
    if keys.get("START", -1) < 0:
        return None
    return FreezeBN(keys.START, model, loader(), cfg.TEST.PRECISE_BN.NUM_ITER, affine=keys.AFFINE)


def _diagnose(cfg: Any, model: nn.Module, loader: PopulationLoader) -> HookBase | None:
    period = cfg.TEST.get("DIAGNOSE", {}).get("PERIOD", 0)
    if period == 0:
        return None
    return DiagnoseBN(period, model, loader(), cfg.TEST.PRECISE_BN.NUM_ITER)


def _merge(cfg: Any, model: nn.Module, loader: PopulationLoader) -> HookBase | None:
    if comm.get_world_size() == 1:
        return None
    return MergeStatistics(model, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD)


# Our hooks in the order in which they run: which class, and what makes one from (cfg, model,
# population loader), or None where cfg does not ask for it.
_OURS: tuple[
    tuple[type[HookBase], Callable[[Any, nn.Module, PopulationLoader], HookBase | None]], ...
] = (
    (PreciseBN, _precise_bn),
    (FreezeBN, _freeze_bn),
    (WeightAverage, _weight_average),
    (DiagnoseBN, _diagnose),
    (MergeStatistics, _merge),
)


def with_rethinking_bn(
    hooks: Sequence[HookBase | None],
    cfg: Any,
    model: nn.Module,
    *,
    data_loader: Iterable[Any] | None = None,
) -> list[HookBase | None]:
    """Add every hook of ours that ``cfg`` enables to a list of detectron2's.

    For ``build_hooks`` of any DefaultTrainer::

        def build_hooks(self):
            return with_rethinking_bn(super().build_hooks(), self.cfg, self.model)

    and for the list in the middle of tools/lazyconfig_train_net.py, before ``register_hooks``.
    Ours run one after another (population training, then what freezes, averages or measures its
    result, then the merge over ranks) before the first hook that checkpoints, evaluates or writes,
    or where detectron2's PreciseBN was, which ours replaces. A hook of ours that is in the list
    already stays as it is and where it is.

    Args:
        hooks: in their order, None allowed; not modified.
        cfg: read are our keys of SOLVER and TEST, SOLVER.CHECKPOINT_PERIOD and TEST.EVAL_PERIOD,
            and what :func:`rethinking_bn.engine.build_population_loader` reads.
        model: the trainer's, data-parallel wrapper included.
        data_loader: batches for population training, for projects (such as LazyConfig's) whose data
            ``cfg`` does not describe; every ``iter()`` must start over. None: the one that
            TEST.PRECISE_BN describes.

    Returns:
        a new list, of the same hooks on every rank.

    Raises:
        ValueError: for keys of ``cfg`` that cannot be followed, on all ranks.
    """
    return _with(tuple(kind for kind, _ in _OURS), hooks, cfg, model, data_loader)


def _with(
    kinds: tuple[type[HookBase], ...],
    hooks: Sequence[HookBase | None],
    cfg: Any,
    model: nn.Module,
    data_loader: Iterable[Any] | None,
) -> list[HookBase | None]:
    """Add those of our hooks that are of these kinds."""
    warn_of_unread_keys(cfg)
    if isinstance(cfg, CfgNode):
        check_has_keys(cfg)
    result = list(hooks)
    stock = detectron2_hooks.PreciseBN
    ours = tuple(kind for kind, _ in _OURS)
    place = next(
        (i for i, hook in enumerate(result) if isinstance(hook, (stock, *_READERS, *ours))),
        len(result),
    )
    if cfg.TEST.PRECISE_BN.ENABLED and PreciseBN in kinds:  # nothing before `place` is removed
        result = [hook for hook in result if not isinstance(hook, stock)]
    elif place < len(result) and isinstance(result[place], stock):
        place += 1  # it stays, and what reads its statistics comes after it

    @cache
    def loader() -> Iterable[Any]:
        for hook in result:
            if isinstance(hook, PreciseBN):
                return hook.data_loader
        return build_together(cfg) if data_loader is None else data_loader

    for kind, build in _OURS:
        there = next((i for i, hook in enumerate(result) if isinstance(hook, kind)), None)
        if there is not None:
            place = there + 1
            continue
        hook = build(cfg, model, loader) if kind in kinds else None
        if hook is not None:
            result.insert(place, hook)
            place += 1
            if isinstance(hook, WeightAverage):
                _evaluate_too(hook, result, cfg)
    return result


def with_weight_average(
    hooks: Sequence[HookBase | None],
    cfg: Any,
    model: nn.Module,
    *,
    data_loader: Iterable[Any] | None = None,
) -> list[HookBase | None]:
    """Add :class:`WeightAverage` alone, as :func:`with_rethinking_bn` would: same arguments."""
    return _with((WeightAverage,), hooks, cfg, model, data_loader)


def _evaluate_too(average: WeightAverage, hooks: list[HookBase | None], cfg: Any) -> None:
    """Evaluate the average right after the model, into a folder of its own."""
    there = [i for i, hook in enumerate(hooks) if isinstance(hook, detectron2_hooks.EvalHook)]
    if not there:
        return
    own = cfg.clone()
    own.defrost()
    own.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "averaged")

    def evaluate() -> Any:
        if not hasattr(average.trainer, "test"):
            logger.info("This trainer has no test(), so the averaged weights are not evaluated.")
            return None
        return average.evaluate(lambda model: average.trainer.test(own, model))

    hooks.insert(there[0] + 1, detectron2_hooks.EvalHook(cfg.TEST.EVAL_PERIOD, evaluate))
