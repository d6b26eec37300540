"""Training with every key of ours: a mixin for anybody's DefaultTrainer."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, defaults
from detectron2.layers import CycleBatchNormList
from detectron2.solver import build_optimizer as detectron2_build_optimizer
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from rethinking_bn.checkpointer import Checkpointer
from rethinking_bn.config import images_per_pass, with_our_keys
from rethinking_bn.data.domains import build_test_loader, domain_groups, marked_training_dicts
from rethinking_bn.data.register import register_coco_format
from rethinking_bn.engine.accumulation import (
    AccumulatingAMPTrainer,
    AccumulatingTrainer,
    CPUAutocastTrainer,
)
from rethinking_bn.engine.hooks import with_rethinking_bn
from rethinking_bn.engine.load_config import changed, scale_to_ranks
from rethinking_bn.engine.precise_bn import inference_statistics
from rethinking_bn.engine.rank_state import wrap_data_parallel
from rethinking_bn.engine.unread_keys import check_keys_are_read, warn_of_unread_keys
from rethinking_bn.layers import PopulationLayer, compile_norms
from rethinking_bn.population import train_only

logger = logging.getLogger(__name__)

# norm layers that are not on detectron2's closed list of them
_NORM_LAYERS = (PopulationLayer, CycleBatchNormList)

# a DefaultTrainer by the time that a class is made of it
_Base: Any = DefaultTrainer if TYPE_CHECKING else object


class TrainerMixin(_Base):
    """Let a DefaultTrainer of anybody follow every key of ours.

    One word before the trainer, whose overrides stay what they are::

        class MyTrainer(TrainerMixin, DefaultTrainer):
            ...

    - our hooks are placed in what ``build_hooks`` returns, by :func:`with_rethinking_bn`;
    - ``SOLVER.ACCUMULATION_STEPS``, and ``SOLVER.AMP.ENABLED`` on the CPU (bfloat16 autocast);
    - ``SOLVER.TRAIN_ONLY`` and ``MODEL.COMPILE_NORMS`` on what ``build_model`` returns;
    - ``TEST.STATISTICS`` in ``test``, also in one of a subclass;
    - ``SOLVER.WEIGHT_DECAY_NORM`` for our norms, and ``MODEL.DOMAIN_BN`` in the loaders;
    - weights and checkpoints are read by :class:`Checkpointer`, which executes no code;
    - keys of ours that nothing reads are refused, and ``rethinking_bn`` is logged as detectron2 is.

    A config without our keys gets their defaults. Several processes on the CPU work, too.
    """

    cfg: CfgNode
    checkpointer: Any
    _trainer: Any

    def __init__(self, cfg: CfgNode) -> None:
        """Take a config as DefaultTrainer does.

        Raises:
            ValueError: for a key of ours that nothing reads or that cannot be followed.
        """
        for name in ("detectron2", "rethinking_bn"):
            if not logging.getLogger(name).isEnabledFor(logging.INFO):
                setup_logger(distributed_rank=comm.get_rank(), name=name)
        cfg = with_our_keys(cfg)
        register_coco_format(cfg)
        check_keys_are_read(cfg)
        ranks = comm.get_world_size()
        cfg = scale_to_ranks(cfg, ranks)
        passes = cfg.SOLVER.ACCUMULATION_STEPS
        images = images_per_pass(cfg, ranks)  # raises before anything is built
        build_model, build_hooks = self.build_model, self.build_hooks

        def build_prepared(cfg: CfgNode) -> nn.Module:
            model = build_model(cfg)
            if cfg.SOLVER.TRAIN_ONLY:
                train_only(model, cfg.SOLVER.TRAIN_ONLY)
            if cfg.MODEL.COMPILE_NORMS:
                logger.info("Compiled norm layers: %d", len(compile_norms(model)))
            return model

        def build_after_our_parts() -> list[HookBase | None]:
            self._take_our_parts()
            return build_hooks()

        # whoever overrides them
        self.__dict__.update(build_model=build_prepared, build_hooks=build_after_our_parts)
        try:
            with _wraps_on_cpu(cfg):
                super().__init__(cfg)
        finally:
            del self.__dict__["build_model"], self.__dict__["build_hooks"]
        if passes > 1:
            logger.info(
                "An iteration is %d passes over %d image(s) on each of %d process(es); layers that "
                "pool over processes (SyncBN, shuffling) pool the images of one pass.",
                *(passes, images, ranks),
            )
        others = _decayed_otherwise(cfg, self._trainer.optimizer, self.model)
        if others:
            logger.warning(
                "SOLVER.WEIGHT_DECAY_NORM is %s, but %s.build_optimizer decays %d norm parameters "
                "otherwise: give what it builds to rethinking_bn.engine.decay_norms.",
                *(cfg.SOLVER.WEIGHT_DECAY_NORM, type(self).__name__, len(others)),
            )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        owner = next(kind for kind in cls.__mro__ if "test" in vars(kind))
        if owner is not cls and issubclass(owner, TrainerMixin):
            return  # this one, or done already; else a class of its own or one before this mixin
        test: Any = vars(owner)["test"]
        if isinstance(test, classmethod):
            cls.test = classmethod(_by_chosen_statistics(test.__func__))  # type: ignore
        else:
            cls.test = _by_chosen_statistics(test)  # type: ignore[method-assign]

    def _take_our_parts(self) -> None:
        """Replace detectron2's step trainer and checkpointer, before hooks are built on them."""
        step, cfg = self._trainer, self.cfg
        passes, mixed = cfg.SOLVER.ACCUMULATION_STEPS, cfg.SOLVER.AMP.ENABLED
        on_cpu = mixed and not on_gpu(cfg)
        # others than these have been chosen by somebody
        if type(step) in (SimpleTrainer, AMPTrainer) and (passes > 1 or on_cpu):
            kind = AccumulatingAMPTrainer if mixed else AccumulatingTrainer
            kind = CPUAutocastTrainer if on_cpu else kind
            parts = (step.model, step.data_loader, step.optimizer)
            self._trainer = kind(*parts, accumulation_steps=passes)
        if type(self.checkpointer) is DetectionCheckpointer:
            me = weakref.proxy(self)
            self.checkpointer = Checkpointer(step.model, cfg.OUTPUT_DIR, trainer=me)

    def build_hooks(self) -> list[HookBase | None]:
        """Return the hooks of the class after this one; ours come when they are registered."""
        cfg = self.cfg
        self.cfg = changed(cfg, "TEST.PRECISE_BN.ENABLED", False)  # detectron2's hook is not used
        try:
            return super().build_hooks()
        finally:
            self.cfg = cfg

    def register_hooks(self, hooks: list[HookBase | None]) -> None:
        """Register hooks; with those that are registered first, ours too."""
        if not self._hooks:
            hooks = with_rethinking_bn(hooks, self.cfg, self.model)
        super().register_hooks(hooks)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer, with the norm weight decay for our layers too."""
        return decay_norms(cfg, super().build_optimizer(cfg, model), model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict[str, Any]]]:
        """Build the training loader; with MODEL.DOMAIN_BN images are marked with their domain."""
        if not domain_groups(cfg):
            return super().build_train_loader(cfg)
        return build_detection_train_loader(cfg, dataset=marked_training_dicts(cfg))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict[str, Any]]]:
        """Build the loader of a test set; with MODEL.DOMAIN_BN images are marked."""
        if not domain_groups(cfg):
            return super().build_test_loader(cfg, dataset_name)
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> Any:
        """Evaluate a model by the statistics that TEST.STATISTICS names, or raise a ValueError."""
        with inference_statistics(cfg := with_our_keys(cfg), model):
            return super().test(cfg, model, evaluators)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build detectron2's optimizer for a project's own trainer; it knows our norm layers, too.

    The groups of parameters are those that detectron2 would build if it knew that our layers get
    ``SOLVER.WEIGHT_DECAY_NORM``. Keys of ours that the model has not read are warned of.
    """
    warn_of_unread_keys(cfg)
    return decay_norms(cfg, detectron2_build_optimizer(cfg, model), model)


def decay_norms(
    cfg: CfgNode, optimizer: torch.optim.Optimizer, model: nn.Module
) -> torch.optim.Optimizer:
    """Give SOLVER.WEIGHT_DECAY_NORM to the norms that a fresh optimizer's builder did not know."""
    others = {*_decayed_otherwise(cfg, optimizer, model)}
    if not others:
        return optimizer
    settings: dict[nn.Parameter, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            settings[p] = {key: value for key, value in group.items() if key != "params"}
            if p in others:
                settings[p]["weight_decay"] = cfg.SOLVER.WEIGHT_DECAY_NORM
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for p in model.parameters():  # in the model's order
        if p in settings:
            group = groups.setdefault(tuple(settings[p].items()), {"params": [], **settings[p]})
            group["params"].append(p)
    optimizer.param_groups[:] = groups.values()
    return optimizer


def _decayed_otherwise(
    cfg: CfgNode, optimizer: torch.optim.Optimizer, model: nn.Module
) -> list[nn.Parameter]:
    """Return the parameters of norms of ours that decay by another number than the key's."""
    decay = cfg.SOLVER.WEIGHT_DECAY_NORM
    # as in detectron2, a setting for all biases goes before the one for norms
    bias_is_set = cfg.SOLVER.WEIGHT_DECAY_BIAS is not None
    norms = {
        parameter
        for layer in model.modules()
        if isinstance(layer, _NORM_LAYERS) and decay is not None
        for name, parameter in layer.named_parameters()
        if not (bias_is_set and name.rpartition(".")[2] == "bias")
    }
    groups = [g for g in optimizer.param_groups if g.get("weight_decay", decay) != decay]
    return [p for group in groups for p in group["params"] if p in norms]


def _by_chosen_statistics(test: Callable[..., Any]) -> Callable[..., Any]:
    """Let somebody's ``test(cls, cfg, model, ...)`` follow TEST.STATISTICS."""

    @wraps(test)
    def chosen(cls: Any, cfg: CfgNode, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with inference_statistics(with_our_keys(cfg), model):
            return test(cls, cfg, model, *args, **kwargs)

    return chosen


@contextmanager
def _wraps_on_cpu(cfg: CfgNode) -> Iterator[None]:
    """Let DefaultTrainer wrap a model on the CPU, which detectron2's function for that refuses."""
    stock = defaults.create_ddp_model
    if not on_gpu(cfg):
        defaults.create_ddp_model = lambda model, **options: wrap_data_parallel(model)
    try:
        yield
    finally:
        defaults.create_ddp_model = stock


def on_gpu(cfg: CfgNode) -> bool:
    return torch.device(cfg.MODEL.DEVICE).type == "cuda"
