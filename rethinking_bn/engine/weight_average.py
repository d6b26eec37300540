"""Averaged weights within detectron2: updated, given statistics, saved and evaluated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from detectron2.engine import HookBase
from torch import nn

from rethinking_bn.averaging import AveragedWeights
from rethinking_bn.checkpointer import Checkpointer
from rethinking_bn.engine.precise_bn import autocast_of
from rethinking_bn.engine.rank_state import (
    RankState,
    gather_rank_state,
    is_due,
    load_rank_state,
    merge_statistics,
)
from rethinking_bn.population import layers_to_estimate

logger = logging.getLogger(__name__)

FILE_NAME = "model_averaged"


class WeightAverage(HookBase):
    """Keep an EMA or SWA of the weights, a model of its own, beside a training that it lets be.

    After an iteration the average is updated. Before a checkpoint, an evaluation and the end it
    gets its statistics: with "estimate" by population training, and under unsynced BN merged over
    the ranks as the model's are. At a checkpoint and the end it is also written to
    ``model_averaged.pth``, which any detectron2 loads. Checkpoints of our Trainer hold what
    resuming needs; those of another trainer do too if it calls :meth:`gather_rank_states` on every
    rank before it saves.

    The average starts from the weights before iteration ``start``. From then on, ``rates`` may
    replace the learning rate of the trainer's schedule by SWA's (Izmailov et al., arXiv
    1803.05407): a constant one, or one that falls linearly within each period, with an update at
    the end of each.

    State read: the trained model, the trainer's precision. State changed: its own average,
    ``averaged`` (:class:`rethinking_bn.averaging.AveragedWeights`), and, with ``rates``, the
    optimizer's learning rates. Comes after PreciseBN (a "copy" then has its statistics) and before
    the hooks that merge, checkpoint and evaluate; on every rank.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str,
        *,
        decay: float = 0.999,
        start: int = 0,
        period: int = 1,
        statistics: str = "copy",
        rates: Sequence[float] = (),
        base_rate: float = 0.0,
        data_loader: Iterable[Any] | None = None,
        num_iter: int = 0,
        checkpoint_period: int = 0,
        eval_period: int = 0,
        output_dir: str = "",
    ) -> None:
        """
        Args:
            model: the trainer's, data-parallel wrapper included.
            kind, decay, statistics: as for AveragedWeights; the EMA's decay warms up.
            start: iterations before the average begins.
            period: iterations from one update to the next.
            rates: learning rates from ``start`` on: none, one, or the first and last of a period.
            base_rate: the solver's; a group of parameters with another keeps its ratio to it.
            data_loader, num_iter: for "estimate"; as for PreciseBN.
            checkpoint_period, eval_period: of the trainer, in iterations; 0: only the end.
            output_dir: where ``model_averaged.pth`` goes; "": nowhere.

        Raises:
            ValueError: for another kind or statistics, a decay outside [0, 1], a negative start, a
                period below 1, more than two rates or one not above 0, "estimate" without data.
        """
        if start < 0 or period < 1:
            raise ValueError(
                f"start must not be negative and period at least 1, got {start} and {period}"
            )
        if len(rates) > 2 or (rates and min(*rates, base_rate) <= 0):
            raise ValueError(
                f"rates must be one or two above 0, as base_rate {base_rate}, got {rates}"
            )
        if statistics == "estimate" and (data_loader is None or num_iter < 1):
            raise ValueError('statistics "estimate" needs a data_loader and num_iter at least 1')
        options: Any = {"kind": kind, "decay": decay, "statistics": statistics}
        self.averaged = AveragedWeights(model, **options)
        self._model, self._start, self._period = model, start, period
        self._rates, self._base_rate = tuple(rates), base_rate
        self._data_loader, self._num_iter = data_loader, num_iter
        self._checkpoint_period, self._eval_period = checkpoint_period, eval_period
        self._output_dir, self._started = output_dir, False
        self._rank_states: tuple[int, list[RankState]] | None = None

    @classmethod
    def from_config(
        cls, cfg: Any, model: nn.Module, loader: Callable[[], Iterable[Any]]
    ) -> WeightAverage | None:
        """Return the hook that SOLVER.AVERAGE asks for; a ValueError names what it may be."""
        keys = cfg.SOLVER.AVERAGE
        if not keys.KIND:
            if keys.LR:
                raise ValueError(
                    f"SOLVER.AVERAGE.LR is {keys.LR}, but SOLVER.AVERAGE.KIND is empty"
                )
            return None
        options = {name.lower(): value for name, value in keys.items() if name != "LR"}
        if keys.STATISTICS == "estimate":
            if layers_to_estimate(model):
                options.update(data_loader=loader(), num_iter=cfg.TEST.PRECISE_BN.NUM_ITER)
            else:
                logger.info("The average has the model's statistics: no BN-like layer to estimate.")
                options["statistics"] = "copy"
        try:
            return cls(
                model,
                rates=keys.LR,
                base_rate=cfg.SOLVER.BASE_LR,
                checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
                eval_period=cfg.TEST.EVAL_PERIOD,
                output_dir=cfg.OUTPUT_DIR,
                **options,
            )
        except ValueError as error:
            raise ValueError(f"SOLVER.AVERAGE: {error}") from error

    def before_step(self) -> None:
        """Begin, with the weights as they are now, if it is time to and nothing was resumed."""
        if not self._started and self.trainer.iter >= self._start:
            self.averaged.restart(self._model)
            self._started = True
        if self._rates and self.trainer.iter >= self._start:
            place = (self.trainer.iter - self._start) % self._period / max(1, self._period - 1)
            first, last = self._rates[0], self._rates[-1]
            for group in self.trainer.optimizer.param_groups:
                ratio = group.setdefault("initial_lr", group["lr"]) / self._base_rate
                group["lr"] = ratio * (first + (last - first) * place)

    def after_step(self) -> None:
        """Update, and get ready for whoever reads the average after this iteration."""
        done = self.trainer.iter + 1
        if done > self._start and (done - self._start) % self._period == 0:
            self.averaged.update(self._model)
        saves = is_due(self.trainer, self._checkpoint_period)
        if self.averaged.updates and (saves or is_due(self.trainer, self._eval_period)):
            self._give_statistics()
            if saves and self._output_dir:
                Checkpointer(self.averaged.module, self._output_dir).save_untagged(FILE_NAME)

    def _give_statistics(self) -> None:
        module, due = self.averaged.module, not self.averaged.estimated
        if self.averaged.statistics == "estimate" and due and layers_to_estimate(module):
            assert self._data_loader is not None  # checked in the constructor
            autocast = autocast_of(self.trainer, module)
            self.averaged.estimate_statistics(
                self._data_loader, self._num_iter, autocast=autocast, seed=0
            )
        merge_statistics(module)

    def evaluate(self, test: Callable[[nn.Module], Any]) -> dict[str, Any] | None:
        """Return {"averaged": what ``test`` finds for the average}; None before any update."""
        if not self.averaged.updates:
            logger.info("The weights are not averaged yet, so there is no average to evaluate.")
            return None
        return {"averaged": test(self.averaged.module)}

    def gather_rank_states(self) -> None:
        """Collect what the ranks' averages have of their own, for :meth:`state_dict`.

        A collective: between two merges the statistics under unsynced BN are each rank's own.
        """
        if self._started:
            self._rank_states = self.averaged.updates, gather_rank_state(self.averaged.module)

    def state_dict(self) -> dict[str, Any]:
        """Return the average and its counter; nothing before it has begun."""
        if not self._started:
            return {}
        state = self.averaged.state_dict()
        if self._rank_states is not None and self._rank_states[0] == self.averaged.updates:
            state["rank_states"] = self._rank_states[1]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`'s; see AveragedWeights for the errors."""
        self.averaged.load_state_dict(state)
        if "rank_states" in state:
            load_rank_state(self.averaged.module, state["rank_states"])
        self._started = True
