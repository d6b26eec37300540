"""Population training within detectron2: a hook, and a function for ``--eval-only``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, HookBase
from torch import nn

from rethinking_bn.config import check_has_keys, check_statistics, check_thaw
from rethinking_bn.engine.accumulation import CPUAutocastTrainer
from rethinking_bn.engine.loaders import build_together
from rethinking_bn.engine.rank_state import is_due
from rethinking_bn.engine.unread_keys import warn_of_unread_keys
from rethinking_bn.population import (
    PopulationReport,
    batch_statistics,
    estimate_population_statistics,
    layers_to_estimate,
)
from rethinking_bn.population.forwards import Autocast
from rethinking_bn.population.model_state import modes_kept

logger = logging.getLogger(__name__)

_by_batch: WeakSet[nn.Module] = WeakSet()  # models within inference_statistics


class PreciseBN(HookBase):
    """Estimate population statistics every ``period`` iterations and after the last one.

    In place of detectron2's hook of the same name, with the same constructor; see
    :func:`rethinking_bn.population.estimate_population_statistics`. The loader is started anew each
    time, and the model draws the same random numbers: with a seeded loader, the same weights get
    the same statistics. Runs on every rank, under the mixed precision of the trainer.

    State read: the model, the trainer's precision. State changed: the population statistics, and
    the scalars ``precise_bn/seconds``, ``precise_bn/drift_mean`` and ``precise_bn/drift_max`` (how
    far the moving averages were off, in standard deviations) and ``precise_bn/unreached`` (sets of
    statistics that saw no value). Must come before the hooks that checkpoint, evaluate and write.
    """

    def __init__(
        self, period: int, model: nn.Module, data_loader: Iterable[Any], num_iter: int
    ) -> None:
        """
        Args:
            period: in iterations; 0: only after the last one.
            model: its BN-like layers in training mode are estimated; without any, nothing is done.
            data_loader: yields the model's inputs; without ground truth, the model runs in eval
                mode with only those layers on mini-batch statistics.
            num_iter: batches per rank, equal on all ranks.

        Raises:
            ValueError: if ``num_iter`` is not positive.
        """
        if num_iter < 1:
            raise ValueError(f"num_iter must be a positive integer, got {num_iter!r}")
        self._period, self._model = period, model
        self.data_loader, self.num_iter = data_loader, num_iter
        self.last_report: PopulationReport | None = None

    @classmethod
    def from_config(
        cls, cfg: Any, model: nn.Module, loader: Callable[[], Iterable[Any]]
    ) -> PreciseBN | None:
        """Return the hook that TEST.PRECISE_BN asks for; None if it does not, or without layers.

        Raises:
            ValueError: for TEST.PRECISE_BN.THAW, which is for trained models.
        """
        if not cfg.TEST.PRECISE_BN.ENABLED:
            return None
        check_thaw(cfg)
        if not cls.has_layers(model):
            return None
        return cls(cfg.TEST.EVAL_PERIOD, model, loader(), cfg.TEST.PRECISE_BN.NUM_ITER)

    def before_train(self) -> None:
        """Warn of keys of ours that nothing has read, where the trainer has a config."""
        warn_of_unread_keys(getattr(self.trainer, "cfg", None))

    def after_step(self) -> None:
        """Estimate if it is time to."""
        if is_due(self.trainer, self._period):
            self.update_stats()

    def update_stats(self) -> PopulationReport | None:
        """Estimate now, with or without a trainer; return the report, None without layers."""
        if not self.has_layers(self._model):
            return None
        report = estimate_population_statistics(
            self._model,
            self.data_loader,
            self.num_iter,
            autocast=autocast_of(self.trainer, self._model),
            seed=0,
            allow_empty=True,
        )
        self.last_report = report
        if hasattr(self.trainer, "storage"):
            values = {"seconds": report.seconds, "drift_mean": report.drift_mean}
            values |= {"drift_max": report.drift, "unreached": len(report.unreached)}
            named = {f"precise_bn/{name}": value for name, value in values.items()}
            self.trainer.storage.put_scalars(smoothing_hint=False, **named)
        return report

    @staticmethod
    def has_layers(model: nn.Module) -> bool:
        """Return whether there is something to estimate; if not, say so in the log."""
        found = bool(layers_to_estimate(model))
        if not found:
            logger.info("PreciseBN is disabled: no BN-like layer of the model is in training mode.")
        return found


def run_population_training(cfg: CfgNode, model: nn.Module) -> PopulationReport:
    """Estimate the population statistics of a loaded model, as the hook does while training.

    Args:
        cfg: see :func:`build_population_loader`; with SOLVER.AMP.ENABLED under autocast.
        model: estimated are the layers that are in training mode after ``model.train()`` and,
            with TEST.PRECISE_BN.THAW, every FrozenBatchNorm2d; its modes are put back.

    Raises:
        ValueError: see :func:`build_population_loader`, and for layers that cannot be thawed.
    """
    loader = build_together(cfg)
    with modes_kept(model):
        model.train()
        report = estimate_population_statistics(
            model,
            loader,
            cfg.TEST.PRECISE_BN.NUM_ITER,
            autocast=_autocast(model) if cfg.SOLVER.AMP.ENABLED else None,
            seed=0,
            allow_empty=True,
            thaw=cfg.TEST.PRECISE_BN.THAW,
        )
    logger.info("%s", report)
    return report


@contextmanager
def inference_statistics(cfg: CfgNode, model: nn.Module) -> Iterator[None]:
    """Let inference with a model of any project use the statistics that TEST.STATISTICS names.

    Modes of modules come back as they were.

    Raises:
        ValueError: for a value that is neither "population" nor "batch", or a layer that cannot
            normalise by the mini-batch at inference.
    """
    check_has_keys(cfg)
    if check_statistics(cfg) == "population" or model in _by_batch:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(modes_kept(model))
        frozen = stack.enter_context(batch_statistics(model.eval()))
        _by_batch.add(model)
        stack.callback(_by_batch.discard, model)
        said = "Inference by mini-batch statistics of each rank (TEST.STATISTICS); frozen: %s"
        logger.info(said, ", ".join(frozen) or "none")
        yield


def _autocast(model: nn.Module, dtype: torch.dtype | None = None) -> Autocast:
    """Return what makes the autocast context that training ``model`` in mixed precision uses."""
    device = next((tensor.device.type for tensor in model.parameters()), "cpu")
    dtype = dtype or (torch.bfloat16 if device == "cpu" else torch.float16)
    return partial(torch.autocast, device, dtype=dtype)


def autocast_of(trainer: Any, model: nn.Module) -> Autocast | None:
    """Return the autocast of a mixed-precision trainer; None: whatever is active."""
    trainers = (trainer, getattr(trainer, "_trainer", None))
    mixed = (t for t in trainers if isinstance(t, (AMPTrainer, CPUAutocastTrainer)))
    return next((_autocast(model, t.precision) for t in mixed), None)
