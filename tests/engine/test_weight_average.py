"""Averaged weights beside a training: the formula, the files, the results, and a live run alike."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.engine import hooks as stock
from detectron2.modeling import build_model
from torch import Tensor, nn

from rethinking_bn.engine import PreciseBN, Trainer, WeightAverage, with_rethinking_bn
from rethinking_bn.engine.rank_state import MergeStatistics
from tests.engine.test_resume import RecordingTrainer, digest
from tests.engine.tiny import register_data, tiny_config

SWA = {"SOLVER__AVERAGE__KIND": "swa", "SOLVER__AVERAGE__START": "2"}
EMA = {"SOLVER__AVERAGE__KIND": "ema", "SOLVER__AVERAGE__PERIOD": "2"}


class Weights(HookBase):
    """Keep a copy of the weights after every iteration."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, Tensor]] = {}

    def after_step(self) -> None:
        named = self.trainer.model.named_parameters()
        self.seen[self.trainer.iter + 1] = {name: p.detach().clone() for name, p in named}


def average_of(trainer: Trainer) -> WeightAverage:
    (hook,) = (hook for hook in trainer._hooks if isinstance(hook, WeightAverage))
    return hook


def train(cfg: CfgNode) -> Any:
    trainer = RecordingTrainer(cfg)
    trainer.weights = Weights()
    trainer.register_hooks([trainer.weights])
    trainer.train()
    return trainer


def test_beside_a_run_that_it_leaves_alone(tmp_path: Path, caplog: Any) -> None:
    data = register_data(tmp_path)
    without = train(tiny_config(data, tmp_path / "off"))
    cfg = tiny_config(data, tmp_path / "on", **SWA)
    with caplog.at_level(logging.INFO):
        trainer = train(cfg)
    assert trainer.losses == without.losses
    assert digest(trainer.model.state_dict()) == digest(without.model.state_dict())
    assert "averaged" not in trainer._last_eval_results

    # the mean of the weights after iterations 3 to 6
    hook = average_of(trainer)
    assert hook.averaged.updates == 4 and hook.averaged.estimated
    averaged = hook.averaged.module
    for name, weight in averaged.named_parameters():
        mean = sum(trainer.weights.seen[i][name].double() for i in (3, 4, 5, 6)) / 4
        torch.testing.assert_close(weight.double(), mean, rtol=1e-5, atol=1e-6)

    # evaluated after iterations 4 and 6, and not after 2
    said = [r.message for r in caplog.records if "no average to evaluate" in r.message]
    assert len(said) == 1
    lines = [json.loads(line) for line in (tmp_path / "on" / "metrics.json").open()]
    scores = [line for line in lines if "bbox/AP" in line]
    assert scores and all("averaged/bbox/AP" in line for line in scores)
    assert (tmp_path / "on" / "averaged" / "inference").is_dir()

    # a file that detectron2 loads without us
    plain = build_model(cfg)
    DetectionCheckpointer(plain).load(str(tmp_path / "on" / "model_averaged.pth"))
    assert digest(plain.state_dict()) == digest(averaged.state_dict())
    saved = torch.load(tmp_path / "on" / "model_averaged.pth", weights_only=True)
    assert set(saved) == {"model"}
    # its statistics are not the model's
    live = dict(trainer.model.named_buffers())
    running = [name for name in live if name.endswith("running_var")]
    assert not any(torch.equal(live[n], averaged.state_dict()[n]) for n in running)


def test_places_in_the_list_and_the_shared_loader(tmp_path: Path) -> None:
    overrides = {**EMA, "TEST__PRECISE_BN__ENABLED": "True"}
    cfg = tiny_config(register_data(tmp_path), tmp_path / "out", **overrides)
    trainer = Trainer(cfg)
    kinds = (PreciseBN, WeightAverage, MergeStatistics, stock.PeriodicCheckpointer, stock.EvalHook)
    ours = [hook for hook in trainer._hooks if isinstance(hook, kinds)]
    assert [next(k for k in kinds if isinstance(hook, k)) for hook in ours] == [
        *kinds, stock.EvalHook,
    ]  # fmt: skip
    assert ours[0].data_loader is ours[1]._data_loader
    assert with_rethinking_bn(trainer._hooks, cfg, trainer.model) == trainer._hooks
    cfg.TEST.PRECISE_BN.ENABLED = False
    added = with_rethinking_bn([None, stock.PeriodicWriter([])], cfg, trainer.model)
    kinds = ["NoneType", "WeightAverage", "PeriodicWriter"]
    assert [type(hook).__name__ for hook in added] == kinds
    cfg.SOLVER.AVERAGE.KIND = ""
    assert with_rethinking_bn(ours, cfg, trainer.model) == ours


def test_without_a_layer_to_estimate(tmp_path: Path, caplog: Any) -> None:
    overrides = {**EMA, "MODEL__RESNETS__NORM": "FrozenBN", "MODEL__RETINANET__NORM": ""}
    cfg = tiny_config(register_data(tmp_path), tmp_path / "out", **overrides)
    with caplog.at_level(logging.INFO):
        assert average_of(Trainer(cfg)).averaged.statistics == "copy"
    assert "no BN-like layer to estimate" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("KIND", "mean", "kind must be one of ema, swa; got 'mean'"),
        ("STATISTICS", "none", "statistics must be one of estimate, average, copy; got 'none'"),
        ("DECAY", 2.0, r"decay must be in \[0, 1\], got 2.0"),
        ("START", -1, "start must not be negative .*got -1"),
        ("PERIOD", 0, ".*period at least 1, got 0 and 0"),
        ("LR", (0.1, 0.0), r"rates must be .*got \(0.1, 0.0\)"),
        ("LR", (0.3, 0.2, 0.1), r"rates must be .*got \(0.3, 0.2, 0.1\)"),
    ],
)
def test_wrong_keys(tmp_path: Path, key: str, value: Any, said: str) -> None:
    cfg = tiny_config("none", tmp_path, **EMA)
    cfg.SOLVER.AVERAGE[key] = value
    with pytest.raises(ValueError, match=f"SOLVER.AVERAGE: {said}"):
        with_rethinking_bn([], cfg, nn.BatchNorm2d(2), data_loader=[])


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ((), [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]),
        ((0.5,), [1.0, 0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        ((0.6, 0.2), [1.0, 0.9, 0.6, 0.4, 0.2, 0.6, 0.4, 0.2]),
    ],
)
def test_the_schedule_of_swa(rates: tuple[float, ...], expected: list[float]) -> None:
    """Constant, or falling to the iteration that the average is updated after."""
    model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 2.0}]
    optimizer = torch.optim.SGD(groups, 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.1 * step)
    model.forward = lambda x: model[1](model[0](x)).sum()
    average = WeightAverage(model, "swa", start=2, period=3, rates=rates, base_rate=1.0)
    updates: list[int] = []
    average.averaged.update = lambda model: updates.append(trainer.iter)  # type: ignore
    trainer = SimpleTrainer(model, [torch.zeros(1, 1)] * 8, optimizer)
    seen: list[list[float]] = []
    note = stock.CallbackHook(
        before_step=lambda t: seen.append([group["lr"] for group in t.optimizer.param_groups])
    )
    trainer.register_hooks([stock.LRScheduler(optimizer, scheduler), average, note])
    trainer.train(0, 8)
    assert [lr for lr, _ in seen] == pytest.approx(expected)
    assert all(twice == pytest.approx(2 * once) for once, twice in seen)
    assert updates == [4, 7]
