"""Train the last part of a run with the statistics of inference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rethinking_bn.engine.precise_bn import PreciseBN
from rethinking_bn.engine.rank_state import merge_statistics
from rethinking_bn.population import freeze_batch_norm

logger = logging.getLogger(__name__)


class FreezeBN(HookBase):
    """From one iteration on, let every BN-like layer normalise by its population statistics.

    Weights that are trained on for a while with what inference uses fit it, which makes small
    normalisation batches nearly as good as large ones (arXiv 2105.07576, section 4, Figure 6).
    Before iteration ``start`` the statistics are estimated, as :class:`PreciseBN` does, and all
    layers are frozen for the rest of the run, whatever ``train()`` says. Runs on every rank.

    State read: the model, the trainer's precision and optimizer. State changed: the population
    statistics, once, and the layers' mode. State kept in a checkpoint: that the layers are frozen,
    and so are those of a resumed run, whatever its ``start``.
    """

    def __init__(
        self,
        start: int,
        model: nn.Module,
        data_loader: Iterable[Any] | None = None,
        num_iter: int = 0,
        *,
        affine: bool = False,
    ) -> None:
        """
        Args:
            start: the first iteration with frozen layers, counted from 0.
            model: the trainer's; may be wrapped in DistributedDataParallel.
            data_loader: as PreciseBN's; its batches are estimated on. None: what the layers have
                stored is frozen, after it has been merged over the ranks.
            num_iter: batches per rank, equal on all ranks.
            affine: freeze the layers' weight and bias, too: no weight decay, no momentum. Under
                DistributedDataParallel, which waits for all gradients, theirs are discarded.

        Raises:
            ValueError: if ``start`` is negative, or ``num_iter`` with a loader not positive.
        """
        if start < 0:
            raise ValueError(f"start must not be negative, got {start}")
        self._start, self._model, self._affine = start, model, affine
        self._estimator: PreciseBN | None = None
        if data_loader is not None:
            self._estimator = PreciseBN(0, model, data_loader, num_iter)
        self._is_frozen = self._was_frozen = False

    @classmethod
    def from_config(
        cls, cfg: Any, model: nn.Module, loader: Callable[[], Iterable[Any]]
    ) -> FreezeBN | None:
        """Return the hook that SOLVER.FREEZE_BN asks for; None if it does not."""
        keys = cfg.SOLVER.FREEZE_BN
        if keys.START < 0:
            return None
        return cls(keys.START, model, loader(), cfg.TEST.PRECISE_BN.NUM_ITER, affine=keys.AFFINE)

    def before_step(self) -> None:
        """Estimate and freeze when it is time to; freeze when resumed after that."""
        now, before = self.trainer.iter, self._was_frozen
        if self._is_frozen or (now < self._start and not before):
            return
        if (now < self._start) if before else (now > self._start):
            logger.warning(
                "FreezeBN: this run came to iteration %d %s, and is frozen from now on; start is "
                "%d.",
                *(now, "frozen" if before else "unfrozen", self._start),
            )
        if self._estimator is not None and not self._was_frozen:
            self._estimator.trainer = self.trainer
            self._estimator.update_stats()
        elif not self._was_frozen:
            merge_statistics(self._model)
        self._freeze()
        self._is_frozen = True

    def _freeze(self) -> None:
        wrapped = isinstance(self._model, DistributedDataParallel)
        names = freeze_batch_norm(self._model, affine=self._affine and not wrapped)
        if self._affine and wrapped:
            layers = [self._model.get_submodule(name) for name in names]
            _discard_gradients([p for m in layers for p in m.parameters()], self.trainer.optimizer)
        what = "statistics, weight and bias" if self._affine else "statistics"
        logger.info(
            "FreezeBN: %s of %d layers frozen from iteration %d on",
            *(what, len(names), self.trainer.iter),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return whether the layers are frozen, nothing before that."""
        return {"frozen": True} if self._is_frozen or self._was_frozen else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`'s; the next step freezes."""
        self._was_frozen = bool(state_dict.get("frozen", False))


def _discard_gradients(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer see no gradient of some parameters, though a backward computes one."""
    for parameter in parameters:
        if parameter.requires_grad:  # zeros for who clips all gradients by their norm before that
            parameter.register_hook(torch.zeros_like)

    def forget(*_: Any) -> None:
        for parameter in parameters:
            parameter.grad = None  # so neither weight decay nor momentum applies

    optimizer.register_step_pre_hook(forget)
