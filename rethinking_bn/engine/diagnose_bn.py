"""The diagnosis of a detectron2 run: remedies as config keys, a hook, a call with a config."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn

from rethinking_bn.diagnosis import Diagnosis, diagnose
from rethinking_bn.engine.loaders import build_together
from rethinking_bn.population.model_state import modes_kept

logger = logging.getLogger(__name__)

# What each remedy is called in a config.
CONFIG_KEYS = {
    "repeated-use": "META_ARCHITECTURE ConfigurableHeadRetinaNet, MODEL.RETINANET.HEAD_NAME "
    "SharedBNRetinaNetHead (row 1), CycleBNRetinaNetHead (row 4) or DomainBNRetinaNetHead (row 6)",
    "stale-statistics": "TEST.PRECISE_BN.ENABLED True (with train_net.py --eval-only for a "
    "checkpoint)",
    "small-batch": "SOLVER.IMS_PER_BATCH, NORM SyncBN, GN or MABN, SOLVER.FREEZE_BN.START, "
    "TEST.STATISTICS batch",
    "dependent-samples": "MODEL.ROI_BOX_HEAD.NAME ShuffleBNBoxHead, MODEL.ROI_MASK_HEAD.NAME "
    "ShuffleBNMaskHead, or NORM SyncBN",
    "domain-shift": "TEST.PRECISE_BN.ENABLED True, TEST.PRECISE_BN.DATASETS",
    "identity-statistics": "MODEL.WEIGHTS with statistics, or TEST.PRECISE_BN.ENABLED True "
    "(TEST.PRECISE_BN.THAW True for frozen layers)",
    "mixed-modes": "MODEL.BACKBONE.FREEZE_AT, MODEL.RESNETS.NORM, SOLVER.FREEZE_BN.START, "
    "TEST.STATISTICS batch",
    "non-finite": "SOLVER.BASE_LR, SOLVER.CLIP_GRADIENTS, SOLVER.AMP.ENABLED",
    "impossible-variance": "MODEL.WEIGHTS, or TEST.PRECISE_BN.ENABLED True",
}
_HOOK_BATCHES = 32


def with_config_keys(diagnosis: Diagnosis) -> Diagnosis:
    """Return the diagnosis with the config keys of every remedy."""
    findings = tuple(
        dataclasses.replace(f, remedy=f"{f.remedy} [{CONFIG_KEYS[f.kind]}]")
        if f.remedy and f.kind in CONFIG_KEYS
        else f
        for f in diagnosis.findings
    )
    return dataclasses.replace(diagnosis, findings=findings)


def run_diagnosis(
    cfg: CfgNode,
    model: nn.Module,
    num_batches: int,
    *,
    target: str = "",
    data_loader: Iterable[Any] | None = None,
) -> Diagnosis:
    """Diagnose a loaded model on the batches of its training, in training mode; modes come back.

    Args:
        cfg: the loader is that of population training, :func:`build_population_loader`.
        num_batches: per rank.
        target: a registered data set of another domain; "": none.
        data_loader: takes the place of the config's.

    Raises:
        ValueError: as ``build_population_loader`` and ``diagnose``.
    """
    loader = build_together(cfg) if data_loader is None else data_loader
    target_batches = None
    if target:
        other = cfg.clone()
        other.defrost()
        other.TEST.PRECISE_BN.DATASETS = (target,)
        target_batches = build_together(other)
    with modes_kept(model):
        model.train()
        diagnosis = diagnose(model, loader, target_batches=target_batches, num_batches=num_batches)
    return with_config_keys(diagnosis)


class DiagnoseBN(HookBase):
    """Diagnose the model every ``period`` iterations, so that a run shows when it goes wrong.

    Scalars ``diagnose/severe``, ``diagnose/warning``, ``diagnose/note`` (how many) and
    ``diagnose/<kind>`` (the largest effect of each kind, "_" for "-"); what is severe is logged.
    Runs on every rank, before the hooks that write. Costs about as much as population training
    with ``num_batches``, twice with the output's effects.

    State read: the model. State changed: none but the trainer's storage.
    """

    def __init__(
        self, period: int, model: nn.Module, data_loader: Iterable[Any], num_batches: int
    ) -> None:
        """
        Args:
            period: in iterations.
            model: the trainer's, data-parallel wrapper included.
            data_loader: batches as training's; every ``iter()`` starts over.
            num_batches: per rank; at most 32 are taken.

        Raises:
            ValueError: for a period below 1 or fewer than two batches.
        """
        if period < 1:
            raise ValueError(f"TEST.DIAGNOSE.PERIOD must be at least 1, got {period}")
        if num_batches < 2:
            raise ValueError(f"a diagnosis needs at least 2 batches, got {num_batches}")
        self._period, self._model, self._data_loader = period, model, data_loader
        self._num_batches = min(num_batches, _HOOK_BATCHES)
        self.last: Diagnosis | None = None

    @classmethod
    def from_config(
        cls, cfg: Any, model: nn.Module, loader: Callable[[], Iterable[Any]]
    ) -> DiagnoseBN | None:
        """Return the hook that TEST.DIAGNOSE asks for; None if it does not."""
        period = cfg.TEST.DIAGNOSE.PERIOD
        return cls(period, model, loader(), cfg.TEST.PRECISE_BN.NUM_ITER) if period else None

    def after_step(self) -> None:
        """Diagnose if it is time to."""
        if (self.trainer.iter + 1) % self._period:
            return
        self.last = with_config_keys(
            diagnose(self._model, self._data_loader, num_batches=self._num_batches, progress=False)
        )
        for name, value in self.last.scalars():
            self.trainer.storage.put_scalar(f"diagnose/{name}", value, smoothing_hint=False)
        level = logging.WARNING if self.last.severe else logging.INFO
        logger.log(level, "%s", self.last)
