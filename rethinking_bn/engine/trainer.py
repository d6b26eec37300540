"""The project's trainer: every key of ours followed, and resumable bit for bit."""

from __future__ import annotations

import logging
import os
import textwrap
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from rethinking_bn.checkpointer import later_checkpoints
from rethinking_bn.engine.checks import check_required_weights, hold_output_dir
from rethinking_bn.engine.launch import Preemption
from rethinking_bn.engine.load_config import changed
from rethinking_bn.engine.loaders import build_train_loader
from rethinking_bn.engine.rank_state import (
    MergeStatistics,
    RankState,
    gather_rank_state,
    load_rank_state,
)
from rethinking_bn.engine.trainer_mixin import TrainerMixin, on_gpu
from rethinking_bn.engine.weight_average import WeightAverage
from rethinking_bn.randomness import announce_iteration, derive_seed

logger = logging.getLogger(__name__)


class Trainer(TrainerMixin, DefaultTrainer):
    """Train a detectron2 model on CPU or GPU, one process or several, with COCO evaluation.

    What it adds to :class:`TrainerMixin`:

    - a resumed run equals the uninterrupted one bit for bit (on the CPU, with the same number of
      processes): all generators are seeded at every iteration from (run seed, iteration, rank);
    - SIGTERM to any rank ends all of them after the iteration, with a checkpoint
      (:class:`~rethinking_bn.engine.launch.Preemption`), and a second training in OUTPUT_DIR is
      refused;
    - before each step, modules with a method ``set_iteration`` are told run seed and iteration.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: as for TrainerMixin; SEED < 0 stands for a random run seed, which a checkpoint
                keeps.
        """
        drawn = comm.all_gather(int.from_bytes(os.urandom(4), "big") >> 1)[0]  # the ranks agree
        seed = cfg.SEED if cfg.SEED >= 0 else drawn
        self._rank_states: tuple[int, list[RankState]] | None = None
        seed_all_rng(seed)
        super().__init__(changed(cfg, "SEED", seed))
        logger.info("Run seed: %d", self.run_seed)
        self._built_hooks = len(self._hooks)

    @property
    def run_seed(self) -> int:
        """The seed, ``cfg.SEED``, that everything random of this run derives from, on all ranks."""
        return self.cfg.SEED

    def build_hooks(self) -> list[HookBase | None]:
        """Return the hooks, in the order statistics, merge, checkpoint, evaluation, writers."""
        cfg, ret = self.cfg, super().build_hooks()
        merge = MergeStatistics(self.model, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD)
        evaluates = next(i for i, hook in enumerate(ret) if isinstance(hook, hooks.EvalHook))
        saves = evaluates - 1 if comm.is_main_process() else evaluates
        return [*ret[:saves], merge, *ret[saves:evaluates], Preemption(), *ret[evaluates:]]

    def train(self) -> dict[str, Any] | None:
        """Train from ``start_iter`` to ``max_iter``; as DefaultTrainer's."""
        if hasattr(self.data_loader, "start_at"):
            self.data_loader.start_at(self.start_iter)
            self._trainer._data_loader_iter_obj = None
        elif self.start_iter > 0:
            logger.warning("The training loader cannot fast-forward: its data starts over.")
        with hold_output_dir(self.cfg):
            return super().train()

    def run_step(self) -> None:
        """Seed every generator for this iteration and take the step."""
        # numpy takes 32 bits
        seed_all_rng(derive_seed(self.run_seed, self.iter, comm.get_rank()) % 2**32)
        announce_iteration(self.model, self.run_seed, self.iter)
        # TorchScript (the focal loss) rounds differently once a process has called it a few times
        # and it gets optimized, which a resumed process has not. GPUs keep the fused kernels.
        with torch.jit.optimized_execution(on_gpu(self.cfg)):
            super().run_step()

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint, or ``MODEL.WEIGHTS``; warn of later checkpoints.

        Raises:
            RuntimeError: on every rank, if they do not see the same last checkpoint.
            ValueError: for no weights under ``MODEL.MABN.REQUIRE_WEIGHTS``.
        """
        found = self.checkpointer.get_checkpoint_file() if resume else ""
        seen = comm.all_gather(os.path.basename(found))
        if len(set(seen)) > 1:
            raise RuntimeError(
                f"the ranks see different last checkpoints, {seen}: OUTPUT_DIR "
                f"{self.cfg.OUTPUT_DIR} must be one folder for all of them"
            )
        if not found:
            check_required_weights(self.cfg)
        super().resume_or_load(resume)
        later = later_checkpoints(self.cfg.OUTPUT_DIR, self.start_iter)
        if later:
            logger.warning(
                "%s holds checkpoints of an earlier run (%s), which this one will overwrite from "
                "iteration %d on.%s",
                *(self.cfg.OUTPUT_DIR, textwrap.shorten(", ".join(later), 60), self.start_iter),
                "" if found else " --resume would go on from the last one.",
            )

    def state_dict(self) -> dict[str, Any]:
        """Return DefaultTrainer's state with the run seed and every rank's own state."""
        state = super().state_dict()
        state["run_seed"] = self.run_seed
        if comm.get_world_size() == 1:
            state["rank_states"] = gather_rank_state(self.model)
        elif self._rank_states is not None and self._rank_states[0] == self.iter:
            state["rank_states"] = self._rank_states[1]
        else:
            logger.warning("Saved without the ranks' own state: resuming from it is not exact.")
        return state

    def gather_rank_states(self) -> None:
        """Collect what :meth:`state_dict` will hold for this iteration, on all ranks."""
        self._rank_states = (self.iter, gather_rank_state(self.model))
        for hook in self._hooks:
            if isinstance(hook, WeightAverage):
                hook.gather_rank_states()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`'s; the run seed of the checkpoint replaces ``cfg.SEED``."""
        if "run_seed" in state_dict:
            self._adopt_seed(state_dict["run_seed"])
        super().load_state_dict(state_dict)
        if "rank_states" in state_dict:
            passes = self.cfg.SOLVER.ACCUMULATION_STEPS
            load_rank_state(self.model, state_dict["rank_states"], passes)
        else:
            logger.warning("The checkpoint has no state of the single ranks: resume is not exact.")

    def _adopt_seed(self, seed: int) -> None:
        """Continue with another run seed: rebuild what was built from the old one."""
        if seed == self.run_seed:
            return
        logger.info("Run seed: %d, the checkpoint's, not %d", seed, self.run_seed)
        self.cfg = changed(self.cfg, "SEED", seed)
        self._trainer.reset_data_loader(lambda: self.build_train_loader(self.cfg))
        registered = self._hooks[self._built_hooks :]
        self._hooks.clear()
        self.register_hooks(self.build_hooks())
        self._built_hooks = len(self._hooks)
        self._hooks.extend(registered)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict[str, Any]]]:
        """Build a loader that can begin at any iteration; an override of any kind is fine too."""
        return build_train_loader(cfg)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Return COCO's evaluation; results also go to ``OUTPUT_DIR/inference``."""
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))
