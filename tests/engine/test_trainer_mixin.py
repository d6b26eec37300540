"""TrainerMixin: anybody's DefaultTrainer follows every key of ours, or refuses it (defect 44)."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.utils.env import seed_all_rng
from torch import nn

from rethinking_bn.engine import (
    AccumulatingTrainer,
    Checkpointer,
    Trainer,
    TrainerMixin,
    WeightAverage,
    build_optimizer,
    decay_norms,
    inference_statistics,
    with_rethinking_bn,
)
from rethinking_bn.engine.accumulation import CPUAutocastTrainer
from rethinking_bn.engine.launch import Preemption
from rethinking_bn.engine.rank_state import MergeStatistics
from rethinking_bn.layers import MultiDomainBatchNorm2d, compile_norms
from rethinking_bn.population import train_only
from tests.engine.tiny import register_data, tiny_config, write_data
from tests.helpers import run_distributed

MODEL = {
    "MODEL__META_ARCHITECTURE": "ConfigurableHeadRetinaNet",
    "MODEL__RETINANET__HEAD_NAME": "SharedBNRetinaNetHead",
    "MODEL__RETINANET__SCORE_THRESH_TEST": "0.0",
    "SOLVER__MAX_ITER": "3",
    "TEST__EVAL_PERIOD": "0",
}
KEYS = {
    **MODEL,
    "SOLVER__ACCUMULATION_STEPS": "2",
    "SOLVER__TRAIN_ONLY": "('head.*', 'backbone.fpn*')",
    "SOLVER__WEIGHT_DECAY_NORM": "0.5",
    "SOLVER__FREEZE_BN__START": "2",
    "SOLVER__AVERAGE__KIND": "swa",
    "SOLVER__AVERAGE__LR": "(0.02, 0.01)",
    "SOLVER__AVERAGE__PERIOD": "2",
    "TEST__PRECISE_BN__ENABLED": "True",
    "TEST__STATISTICS": "batch",
    "TEST__DIAGNOSE__PERIOD": "2",
}


class Base(DefaultTrainer):
    """Somebody's class between the mixin and detectron2's trainer."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.has_begun = True


class Stock(TrainerMixin, Base):
    """Somebody's trainer; its data are in the order of ours."""

    build_train_loader = Trainer.build_train_loader
    build_evaluator = Trainer.build_evaluator


def trained(kind: Any, cfg: CfgNode) -> dict[str, Any]:
    """Train and return all that can be compared."""
    seed_all_rng(cfg.SEED)
    # the focal loss is TorchScript, which rounds otherwise once this process has called it often
    with torch.jit.optimized_execution(False):
        trainer = kind(cfg)
        assert hasattr(trainer, "has_begun") == (kind is Stock)
        trainer.train()
    seen = {name: value for name, (value, _) in trainer.storage.latest().items()}
    average = next(h for h in trainer._hooks if isinstance(h, WeightAverage)).averaged
    extra = (Preemption, MergeStatistics)
    groups = [
        (len(group["params"]), group["lr"], group["weight_decay"])
        for group in trainer._trainer.optimizer.param_groups
    ]
    return {
        "state": trainer.model.state_dict(),
        "average": average.module.state_dict(),
        "updates": average.updates,
        "hooks": [type(h).__name__ for h in trainer._hooks if not isinstance(h, extra)],
        "trains": [n for n, p in trainer.model.named_parameters() if p.requires_grad],
        "groups": groups,
        "step": type(trainer._trainer).__name__,
        "scalars": {n: v for n, v in seen.items() if "time" not in n and "seconds" not in n},
    }


def on_rank(rank: int, folder: Path) -> list[dict[str, Any]]:
    data = register_data(folder)
    return [
        trained(kind, tiny_config(data, folder / kind.__name__, **KEYS))
        for kind in (Stock, Trainer)
    ]


@pytest.mark.parametrize("processes", [1, 2])
def test_every_key_gives_what_our_trainer_gives(tmp_path: Path, processes: int) -> None:
    write_data(tmp_path)
    runs = [on_rank(0, tmp_path)] if processes == 1 else run_distributed(
        on_rank, 2, tmp_path, timeout=200
    )  # fmt: skip
    for stock, ours in runs:
        for key in ("updates", "hooks", "trains", "groups", "step"):
            assert stock[key] == ours[key], key
        for key in ("state", "average", "scalars"):
            torch.testing.assert_close(stock[key], ours[key], rtol=0, atol=0, equal_nan=True)
    stock = runs[0][0]
    prefix = "module." if processes > 1 else ""
    assert stock["step"] == "AccumulatingTrainer" and stock["updates"] == 1
    assert {n.removeprefix(prefix).split(".")[0] for n in stock["trains"]} == {"head", "backbone"}
    assert not any("bottom_up" in name for name in stock["trains"])
    assert stock["scalars"]["lr"] == 0.02
    assert 0.5 in {decay for _, _, decay in stock["groups"]}
    order = ["FollowKeys", "PreciseBN", "FreezeBN", "WeightAverage", "DiagnoseBN"]
    assert [name for name in stock["hooks"] if name in order] == order
    assert {"diagnose/severe", "precise_bn/drift_max"} <= stock["scalars"].keys()
    assert {"bbox/AP", "averaged/bbox/AP"} <= stock["scalars"].keys()


@pytest.fixture
def cfg(tmp_path: Path) -> CfgNode:
    return tiny_config(register_data(tmp_path), tmp_path / "out", **MODEL)


def test_overrides_stay_what_they_are(cfg: CfgNode) -> None:
    """Of build_model, build_hooks, build_train_loader, test and build_evaluator."""
    seen: list[Any] = []

    class Mine(TrainerMixin, DefaultTrainer):
        @classmethod
        def build_model(cls, cfg: CfgNode) -> nn.Module:
            return DefaultTrainer.build_model(cfg).double().float()

        def build_hooks(self) -> list[HookBase | None]:
            return [*DefaultTrainer.build_hooks(self), hooks.CallbackHook()]

        @classmethod
        def build_train_loader(cls, cfg: CfgNode) -> Any:
            seen.append("loader")
            return Trainer.build_train_loader(cfg)

        @classmethod
        def test(cls, cfg: CfgNode, model: Any, evaluators: Any = None) -> Any:
            norm = model.backbone.bottom_up.stem.conv1.norm
            x = torch.randn(2, 8, 3, 3)
            seen.append(norm(x).mean((0, 2, 3)).abs().max() < 1e-5)  # by the mini-batch
            return {}

    cfg.merge_from_list(["SOLVER.TRAIN_ONLY", ("backbone.*",), "TEST.STATISTICS", "batch"])
    cfg.merge_from_list(["SOLVER.MAX_ITER", 1, "TEST.PRECISE_BN.ENABLED", True])
    trainer = Mine(cfg)
    assert isinstance(trainer._hooks[-1], hooks.CallbackHook)
    kinds = [type(hook).__module__.split(".")[0] for hook in trainer._hooks]
    assert kinds.count("rethinking_bn") == 2  # population training, and what looks at the keys
    assert not any(isinstance(hook, hooks.PreciseBN) for hook in trainer._hooks)
    trained = {n.split(".")[0] for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == {"backbone"}
    trainer.train()
    assert seen[-1].item() and seen.count("loader") >= 1
    assert "build_model" not in vars(trainer)


def test_hooks_without_super_keep_our_step_and_checkpointer(cfg: CfgNode) -> None:
    """They were detectron2's, which executes code and takes one pass, or float32 on the CPU."""

    class Mine(Stock):
        def build_hooks(self) -> list[HookBase | None]:
            return DefaultTrainer.build_hooks(self)

    for keys, step in (
        (["SOLVER.ACCUMULATION_STEPS", 2], AccumulatingTrainer),
        (["SOLVER.AMP.ENABLED", True], CPUAutocastTrainer),
    ):
        cfg.merge_from_list(keys)
        trainer = Mine(cfg)
        assert type(trainer._trainer) is step and type(trainer.checkpointer) is Checkpointer
        saves = [h for h in trainer._hooks if isinstance(h, hooks.PeriodicCheckpointer)]
        assert saves[0].checkpointer is trainer.checkpointer
        assert "build_hooks" not in vars(trainer)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 3
    with pytest.raises(ValueError, match="IMS_PER_BATCH 4 .*WORLD_SIZE 3"):
        Mine(cfg)


def test_somebodys_optimizer_is_warned_of(cfg: CfgNode, caplog: pytest.LogCaptureFixture) -> None:
    """One that does not know our norms lets them decay: that was not said."""

    class Mine(Stock):
        @classmethod
        def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.AdamW(model.parameters(), weight_decay=0.1)

    class Mended(Mine):
        @classmethod
        def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
            return decay_norms(cfg, super().build_optimizer(cfg, model), model)

    for kind, said in ((Mine, 1), (Mended, 0), (Stock, 0)):
        caplog.clear()
        kind(cfg)
        found = [r.getMessage() for r in caplog.records if "WEIGHT_DECAY_NORM" in r.getMessage()]
        assert len(found) == said
        assert all("0.0" in x and "Mine" in x and "decay_norms" in x for x in found)


def test_a_test_from_a_class_before_the_mixin_follows_the_statistics(cfg: CfgNode) -> None:
    class Theirs:
        @classmethod
        def test(cls, cfg: CfgNode, model: nn.Module) -> bool:
            x = torch.randn(2, 8, 3, 3) + 5
            norm: Any = model.backbone.bottom_up.stem.conv1.norm  # type: ignore[union-attr]
            return bool(norm(x).mean((0, 2, 3)).abs().max() < 1e-5)

    class Mine(Theirs, TrainerMixin, DefaultTrainer):  # type: ignore[misc]
        pass

    model = Mine.build_model(cfg).eval()
    assert not Mine.test(cfg, model)
    cfg.TEST.STATISTICS = "batch"
    assert Mine.test(cfg, model)


def test_norms_are_compiled(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = partial(compile_norms, backend="eager")
    monkeypatch.setattr("rethinking_bn.engine.trainer_mixin.compile_norms", eager)
    cfg.MODEL.COMPILE_NORMS = True
    for kind in (Stock, Trainer):
        layers = [m for m in kind(cfg).model.modules() if isinstance(m, MultiDomainBatchNorm2d)]
        assert layers and all("_compiled_call_impl" in vars(layer) for layer in layers)


def test_a_plain_detectron2_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.engine.tiny.add_rethinking_bn_config", lambda cfg: None)
    plain = tiny_config(register_data(tmp_path), tmp_path / "out", SOLVER__MAX_ITER=1)
    plain.DATASETS.TEST = ()
    Stock(plain).train()
    assert "ACCUMULATION_STEPS" not in plain.SOLVER


def test_what_we_log_is_seen_and_set_up_once(cfg: CfgNode, capsys: Any) -> None:
    """Defect 44: nothing that rethinking_bn logs was seen."""
    loggers = [logging.getLogger(name) for name in ("rethinking_bn", "detectron2")]
    for logger in loggers:
        logger.setLevel(logging.NOTSET)  # as in a fresh process
    cfg.SOLVER.ACCUMULATION_STEPS = 2
    for _ in range(2):
        Stock(cfg)
    out = capsys.readouterr().out
    assert out.count("2 passes") == 2 and all(len(logger.handlers) <= 1 for logger in loggers)


class Hooked(DefaultTrainer):
    """Somebody's trainer that has our hooks alone."""

    def build_hooks(self) -> list[HookBase | None]:
        return with_rethinking_bn(super().build_hooks(), self.cfg, self.model)


class Thorough(Hooked):
    """One that follows the keys by the public parts."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        step: Any = self._trainer  # type: ignore[has-type]
        passes = cfg.SOLVER.ACCUMULATION_STEPS
        parts = (step.model, step.data_loader, step.optimizer)
        self._trainer = AccumulatingTrainer(*parts, accumulation_steps=passes)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        if cfg.SOLVER.TRAIN_ONLY:
            train_only(model, cfg.SOLVER.TRAIN_ONLY)
        if cfg.MODEL.COMPILE_NORMS:
            compile_norms(model, backend="eager")
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> Any:
        with inference_statistics(cfg, model):
            return {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.ACCUMULATION_STEPS", 2),
        ("SOLVER.TRAIN_ONLY", ("head.*",)),
        ("TEST.STATISTICS", "batch"),
        ("MODEL.COMPILE_NORMS", True),
    ],
)
def test_hooks_alone_refuse_what_their_trainer_ignores(cfg: CfgNode, key: str, value: Any) -> None:
    """Defect 44: each of these was ignored without a word."""
    cfg.merge_from_list([key, value, "SOLVER.MAX_ITER", 1])
    with pytest.raises(ValueError, match="TrainerMixin") as caught:
        Hooked(cfg).train()
    said = str(caught.value)
    assert key in said and repr(value) in said and "Hooked" in said and "\n" not in said
    Thorough(cfg).train()
    if key == "TEST.STATISTICS":

        class Forgetful(Thorough):
            @classmethod
            def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> Any:
                return {}

        with pytest.raises(ValueError, match=r"TEST.STATISTICS.*Forgetful"):
            Forgetful(cfg).train()
