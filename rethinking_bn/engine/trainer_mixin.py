"""Training with every key of ours: a mixin for anybody's DefaultTrainer, and our own trainer."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer
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
from rethinking_bn.engine.checks import apply_train_only
from rethinking_bn.engine.hooks import with_rethinking_bn
from rethinking_bn.engine.load_config import scale_to_ranks
from rethinking_bn.engine.precise_bn import inference_statistics
from rethinking_bn.engine.rank_state import wrap_data_parallel
from rethinking_bn.engine.unread_keys import check_keys_are_read, warn_of_unread_keys
from rethinking_bn.layers import PopulationLayer, compile_norms
from rethinking_bn.layers.bn_like import communicates

logger = logging.getLogger(__name__)

# detectron2 recognises norm layers by a closed list of torch's classes. Its own CycleBatchNormList
# is not on it, and neither are these layers of ours that subclass none of torch's.
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

    A config without our keys gets their defaults. In several processes on the CPU, where detectron2
    cannot wrap the model, ``DefaultTrainer.__init__`` is passed over and its work done here.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: as for DefaultTrainer.

        Raises:
            ValueError: for a key of ours that nothing reads, images that cannot be divided among
                ranks and passes, or a pattern of ``SOLVER.TRAIN_ONLY`` that names no module; in
                several processes on the CPU, for a class between this one and DefaultTrainer that
                has an ``__init__``.
        """
        for name in ("detectron2", "rethinking_bn"):
            if not logging.getLogger(name).isEnabledFor(logging.INFO):
                setup_logger(distributed_rank=comm.get_rank(), name=name)
        cfg = with_our_keys(cfg)
        register_coco_format(cfg)
        check_keys_are_read(cfg)
        cfg = scale_to_ranks(cfg, comm.get_world_size())
        images_per_pass(cfg, comm.get_world_size())  # raises before anything is built
        build_model, build_hooks = self.build_model, self.build_hooks

        def build_prepared(cfg: CfgNode) -> nn.Module:
            model = build_model(cfg)
            apply_train_only(cfg, model)
            if cfg.MODEL.COMPILE_NORMS:
                logger.info("Compiled norm layers: %d", len(compile_norms(model)))
            return model

        def build_after_our_parts() -> list[HookBase | None]:
            self._take_our_parts()
            return build_hooks()

        # whoever overrides them
        self.__dict__.update(build_model=build_prepared, build_hooks=build_after_our_parts)
        try:
            if comm.get_world_size() > 1 and not on_gpu(cfg):
                self._build(cfg)
            else:
                super().__init__(cfg)
        finally:
            del self.__dict__["build_model"], self.__dict__["build_hooks"]
        log_passes(self.cfg, self.model)
        optimizer = self._trainer.optimizer
        others = _decayed_otherwise(cfg, optimizer, self.model)
        if others:
            logger.warning(
                "SOLVER.WEIGHT_DECAY_NORM is %s, but %s.build_optimizer decays %d parameters of "
                "norm layers otherwise: give what it builds to rethinking_bn.engine.decay_norms.",
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

    def _build(self, cfg: CfgNode) -> None:
        """Do what DefaultTrainer's __init__ does, with a wrapper for models on the CPU."""
        mro = type(self).__mro__
        between = mro[mro.index(TrainerMixin) + 1 : mro.index(DefaultTrainer)]
        passed = [kind.__name__ for kind in between if "__init__" in vars(kind)]
        if passed:
            raise ValueError(
                f"several processes on the CPU skip {passed[0]}.__init__, between TrainerMixin "
                "and DefaultTrainer: train in one process or on GPUs, or move its work to a class "
                f"before TrainerMixin, such as {type(self).__name__}"
            )
        super(DefaultTrainer, self).__init__()
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = wrap_data_parallel(model)
        self._trainer = SimpleTrainer(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self.register_hooks(self.build_hooks())

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
        """Register hooks; ours, too, among those that are registered first."""
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
        """Evaluate a model by the statistics that ``cfg.TEST.STATISTICS`` names.

        Raises:
            ValueError: for another value of that key, or a layer that cannot do it.
        """
        cfg = with_our_keys(cfg)
        with inference_statistics(cfg, model):
            return super().test(cfg, model, evaluators)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build detectron2's optimizer; every norm layer gets ``SOLVER.WEIGHT_DECAY_NORM``.

    Learning rates, the settings for biases and gradient clipping are detectron2's. A model whose
    norm layers detectron2 knows gets exactly detectron2's parameter groups; any other model gets
    the groups detectron2 would have built had it known the layers. It warns of keys of ours in
    ``cfg`` that the model has not read. For a project with its own trainer.
    """
    warn_of_unread_keys(cfg)
    return decay_norms(cfg, detectron2_build_optimizer(cfg, model), model)


def decay_norms(
    cfg: CfgNode, optimizer: torch.optim.Optimizer, model: nn.Module
) -> torch.optim.Optimizer:
    """Give SOLVER.WEIGHT_DECAY_NORM to the norms that a fresh optimizer's builder did not know."""
    decay = cfg.SOLVER.WEIGHT_DECAY_NORM
    others = {id(p) for p in _decayed_otherwise(cfg, optimizer, model)}
    if not others:
        return optimizer
    settings: dict[nn.Parameter, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        shared = {key: value for key, value in group.items() if key != "params"}
        for p in group["params"]:
            settings[p] = {**shared, "weight_decay": decay} if id(p) in others else shared
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for parameter in model.parameters():  # in the model's order
        if parameter in settings:
            shared = settings[parameter]
            group = groups.setdefault(tuple(shared.items()), {"params": [], **shared})
            group["params"].append(parameter)
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


def on_gpu(cfg: CfgNode) -> bool:
    return torch.device(cfg.MODEL.DEVICE).type == "cuda"


def changed(cfg: CfgNode, key: str, value: Any) -> CfgNode:
    """Return a copy of a config, as frozen as it is, with another value of one key."""
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([key, value])
    if frozen:
        cfg.freeze()
    return cfg
