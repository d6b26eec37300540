"""The project's trainer: detectron2's DefaultTrainer, on any device and resumable bit for bit."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, hooks
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn

from rethinking_bn.checkpointer import Checkpointer, later_checkpoints
from rethinking_bn.config import images_per_pass
from rethinking_bn.data.domains import build_test_loader
from rethinking_bn.engine.accumulation import (
    AccumulatingAMPTrainer,
    AccumulatingTrainer,
    CPUAutocastTrainer,
)
from rethinking_bn.engine.checks import apply_train_only, hold_output_dir
from rethinking_bn.engine.data_parallel import wrap_data_parallel
from rethinking_bn.engine.hooks import with_rethinking_bn
from rethinking_bn.engine.merge_statistics import MergeStatistics
from rethinking_bn.engine.optimizer import build_optimizer
from rethinking_bn.engine.precise_bn import inference_statistics
from rethinking_bn.engine.preemption import Preemption
from rethinking_bn.engine.rank_state import RankState, gather_rank_state, load_rank_state
from rethinking_bn.engine.starting_weights import check_required_weights
from rethinking_bn.engine.train_loader import build_train_loader
from rethinking_bn.engine.unread_keys import check_keys_are_read
from rethinking_bn.engine.weight_average import WeightAverage
from rethinking_bn.layers.bn_like import communicates
from rethinking_bn.randomness import announce_iteration, derive_seed

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Train a detectron2 model on CPU or GPU, one process or several, with COCO evaluation.

    What differs from DefaultTrainer:

    - data-parallel training works on the CPU (gloo), and ``SOLVER.AMP.ENABLED`` means bfloat16
      autocast there;
    - norm layers of ours get ``SOLVER.WEIGHT_DECAY_NORM``;
    - population training is ours, and the ranks' statistics are merged before every checkpoint
      and evaluation;
    - a resumed run equals the uninterrupted one bit for bit (on the CPU, with the same number of
      processes; CUDA has kernels that are not deterministic). Nothing random is saved for that:
      all generators are seeded at every iteration from (run seed, iteration, rank), so that what
      evaluation or population training drew does not matter. ``cfg.SEED`` < 0 stands for a random
      run seed, which the checkpoint keeps;
    - an iteration can be several passes (``SOLVER.ACCUMULATION_STEPS``, see
      :class:`rethinking_bn.engine.AccumulatingTrainer`);
    - SIGTERM to any rank ends all of them after the iteration, with a checkpoint
      (:class:`~rethinking_bn.engine.preemption.Preemption`), and a second training in OUTPUT_DIR is
      refused;
    - before each step, modules with a method ``set_iteration`` are told the run seed and the
      iteration (see rethinking_bn.randomness).

    Loggers are left as they are: :func:`rethinking_bn.engine.launch.setup`, detectron2's
    ``default_setup`` or its ``setup_logger()`` make the log visible.

    Attributes:
        cfg: the config in use: scaled to the number of processes, and SEED is the run seed.
        run_seed: the seed everything random of this run derives from, equal on all ranks.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: as for DefaultTrainer, with this package's keys added.

        Raises:
            ValueError: if a key of ours is set that nothing reads, ``SOLVER.IMS_PER_BATCH`` cannot
                be divided among the ranks, or a rank's images among the passes of
                ``SOLVER.ACCUMULATION_STEPS``, or if a pattern of ``SOLVER.TRAIN_ONLY`` names no
                module.
        """
        # DefaultTrainer's own wraps the model for GPUs and has no override for that: skipped
        super(DefaultTrainer, self).__init__()
        check_keys_are_read(cfg)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        images_per_pass(cfg, comm.get_world_size())  # raises before anything is built
        self._seed_is_given = cfg.SEED >= 0
        self.cfg = _with_seed(cfg, cfg.SEED if self._seed_is_given else _random_seed())
        logger.info("Run seed: %d", self.run_seed)
        seed_all_rng(self.run_seed)
        self._rank_states: tuple[int, list[RankState]] | None = None
        model = self.build_model(self.cfg)
        apply_train_only(self.cfg, model)
        optimizer = self.build_optimizer(self.cfg, model)
        data_loader = self.build_train_loader(self.cfg)
        on_gpu = torch.device(self.cfg.MODEL.DEVICE).type == "cuda"
        model = wrap_data_parallel(model, on_gpu)
        self._trainer = _step_trainer(self.cfg, on_gpu)(model, data_loader, optimizer)
        log_passes(self.cfg, model)
        self.scheduler = self.build_lr_scheduler(self.cfg, optimizer)
        self.checkpointer = Checkpointer(model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = self.cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())
        self._built_hooks = len(self._hooks)

    @property
    def run_seed(self) -> int:
        """The seed everything random of this run derives from, equal on all ranks."""
        return self.cfg.SEED

    def build_hooks(self) -> list[HookBase | None]:
        """Return the hooks, in the order statistics, merge, checkpoint, evaluation, writers."""
        cfg = self.cfg
        main = comm.is_main_process()
        ret = [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            _BeforeSaving(self.model, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD),
            hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
            if main
            else None,
            Preemption(),
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate),
            hooks.PeriodicWriter(self.build_writers()) if main else None,
        ]
        return with_rethinking_bn(ret, cfg, self.model)

    def _evaluate(self) -> dict[str, Any]:
        self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

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
        optimize = torch.device(self.cfg.MODEL.DEVICE).type == "cuda"
        with torch.jit.optimized_execution(optimize):
            super().run_step()

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint, or ``MODEL.WEIGHTS``; as DefaultTrainer's.

        Checkpoints of later iterations, which are in the way, are warned of.

        Raises:
            RuntimeError: on every rank, if they do not see the same last checkpoint.
            ValueError: if the config fine-tunes and there are no weights
                (``MODEL.MABN.REQUIRE_WEIGHTS``).
        """
        found = self.checkpointer.get_checkpoint_file() if resume else ""
        seen = comm.all_gather(os.path.basename(found))
        if len(set(seen)) > 1:
            raise RuntimeError(
                f"the ranks see different last checkpoints in {self.cfg.OUTPUT_DIR}: {seen}; "
                "OUTPUT_DIR must be the same folder for all of them"
            )
        if not found:
            check_required_weights(self.cfg)
        super().resume_or_load(resume)
        later = later_checkpoints(self.cfg.OUTPUT_DIR, self.start_iter)
        if later:
            logger.warning(
                "%s holds checkpoints of an earlier run (%s%s), which this one, starting at "
                "iteration %d, will overwrite as it comes to them.%s",
                self.cfg.OUTPUT_DIR,
                ", ".join(later[:3]),
                ", ..." if len(later) > 3 else "",
                self.start_iter,
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
            logger.warning(
                "Saved at an iteration without a checkpoint due, so without the ranks' own state: "
                "resuming from this file is not exact."
            )
        return state

    def gather_rank_states(self) -> None:
        """Collect what :meth:`state_dict` will hold for this iteration; all ranks must call it."""
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
        level = logging.WARNING if self._seed_is_given else logging.INFO
        logger.log(level, "Run seed: %d, the checkpoint's, not %d", seed, self.run_seed)
        self.cfg = _with_seed(self.cfg, seed)
        self._trainer.reset_data_loader(lambda: self.build_train_loader(self.cfg))
        registered = self._hooks[self._built_hooks :]
        self._hooks.clear()
        self.register_hooks(self.build_hooks())
        self._built_hooks = len(self._hooks)
        self._hooks.extend(registered)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluate a model by the statistics that ``cfg.TEST.STATISTICS`` names.

        Raises:
            ValueError: for another value of that key, or a layer that cannot do it.
        """
        with inference_statistics(cfg, model):
            return super().test(cfg, model, evaluators)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build detectron2's optimizer, with the norm weight decay for our layers too."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict[str, Any]]]:
        """Build a loader that can begin at any iteration; an override of any kind is fine too."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict[str, Any]]]:
        """Build detectron2's loader; with MODEL.DOMAIN_BN images are marked with their domain."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Return COCO's evaluation; results also go to ``OUTPUT_DIR/inference``."""
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))


class _BeforeSaving(MergeStatistics):
    """Merge the ranks' statistics, then collect the state that each rank has of its own."""

    def after_step(self) -> None:
        if self.is_due(self.trainer.iter + 1):
            super().after_step()
            self.trainer.gather_rank_states()


def _step_trainer(cfg: CfgNode, on_gpu: bool) -> Callable[..., SimpleTrainer]:
    """Return what makes the trainer of single steps: detectron2's where it can do it."""
    passes, mixed = cfg.SOLVER.ACCUMULATION_STEPS, cfg.SOLVER.AMP.ENABLED
    if mixed and not on_gpu:
        return partial(CPUAutocastTrainer, accumulation_steps=passes)
    if passes == 1:
        return AMPTrainer if mixed else SimpleTrainer
    kind = AccumulatingAMPTrainer if mixed else AccumulatingTrainer
    return partial(kind, accumulation_steps=passes)


def log_passes(cfg: CfgNode, model: nn.Module) -> None:
    """Say what an iteration of several passes is, and what is pooled within one of them."""
    passes, ranks = cfg.SOLVER.ACCUMULATION_STEPS, comm.get_world_size()
    if passes == 1:
        return
    images = images_per_pass(cfg, ranks)
    logger.info(
        "An iteration is %d passes over %d image(s) on each of %d process(es).",
        *(passes, images, ranks),
    )
    pooling = [name for name, module in model.named_modules() if communicates(module)]
    if pooling and ranks > 1:
        logger.info(
            "Layers that pool over processes (SyncBN, shuffling) pool the %d images of one pass, "
            "not those of the iteration: %s and %d more",
            *(images * ranks, pooling[0], len(pooling) - 1),
        )


def _random_seed() -> int:
    """Return a random seed that the ranks agree on."""
    return comm.all_gather(int.from_bytes(os.urandom(4), "big") >> 1)[0]


def _with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    if frozen:
        cfg.freeze()
    return cfg
