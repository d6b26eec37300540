"""The hook and the function around population training, with small models."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("detectron2")

from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, hooks
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage, JSONWriter, get_event_storage

from rethinking_bn.engine import (
    MergeStatistics,
    PreciseBN,
    run_population_training,
    with_rethinking_bn,
)
from rethinking_bn.engine.accumulation import CPUAutocastTrainer
from rethinking_bn.layers import MultiDomainBatchNorm2d
from tests.engine.tiny import register_data, tiny_config, write_data
from tests.helpers import run_distributed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net: Any = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
        self.types: list[torch.dtype] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.net(x)
        self.types.append(self.net[0](x).dtype)
        get_event_storage().put_scalar("seen_by_the_model", len(self.types))
        return {"loss": y.square().mean()}


class Loader:
    """Counts its starts; every one yields the same batches without end."""

    def __init__(self, rank: int = 0) -> None:
        self.starts, self.rank = 0, rank

    def __iter__(self) -> Iterator[Tensor]:
        self.starts += 1
        generator = torch.Generator().manual_seed(self.rank)
        while True:
            yield torch.randn(4, 3, 5, 5, generator=generator) + 2 * self.rank


class Statistics(HookBase):
    """Notes the running mean and the scalars after every step."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        self.layer, self.means, self.scalars = layer, [], []  # type: ignore[var-annotated]

    def after_step(self) -> None:
        self.means.append(self.layer.running_mean.clone())
        self.scalars.append(dict(self.trainer.storage.latest()))


def train(model: Model, period: int, iterations: int, lr: float = 0.0) -> tuple[Any, Loader]:
    loader = Loader()
    trainer = SimpleTrainer(model, Loader(7), torch.optim.SGD(model.parameters(), lr))
    record = Statistics(model.net[1])
    trainer.register_hooks([PreciseBN(period, model, loader, 3), record])
    trainer.train(0, iterations)
    return record, loader


@pytest.mark.parametrize(
    ("period", "runs_at"), [(2, [1, 3, 4]), (0, [4]), (5, [4]), (1, [0, 1, 2, 3, 4])]
)
def test_runs_every_period_and_at_the_end_on_a_restarted_loader(
    period: int, runs_at: list[int]
) -> None:
    model = Model()
    data = iter(Loader())
    with torch.no_grad():
        features = torch.cat([model.net[0](next(data)) for _ in range(3)])
    expected = features.double().mean((0, 2, 3)).float()
    record, loader = train(model, period, 5)
    assert loader.starts == len(runs_at)
    for iteration, mean in enumerate(record.means):
        estimated = torch.allclose(mean, expected, rtol=1e-5, atol=1e-6)
        assert estimated == (iteration in runs_at), iteration
    assert model.net[1].num_batches_tracked == 5  # of training alone
    assert model.training


def test_scalars_reach_the_storage_and_its_writers(tmp_path: Path) -> None:
    model = Model()
    trainer = SimpleTrainer(model, Loader(7), torch.optim.SGD(model.parameters(), 0.1))
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    hook = PreciseBN(2, model, Loader(), 3)
    trainer.register_hooks([hook, hooks.PeriodicWriter([writer], period=1)])
    trainer.train(0, 4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    at = {line["iteration"]: line for line in lines if "precise_bn/drift_max" in line}
    assert set(at) == {1, 3}
    assert at[1]["precise_bn/seconds"] > 0
    assert 0 < at[1]["precise_bn/drift_mean"] <= at[1]["precise_bn/drift_max"]
    assert at[1]["precise_bn/unreached"] == 0
    assert hook.last_report is not None
    assert at[3]["precise_bn/drift_max"] == pytest.approx(hook.last_report.drift)
    # what the model says in population training is not heard
    heard = trainer.storage.history("seen_by_the_model").values()
    assert [iteration for _, iteration in heard] == [0, 1, 2, 3]


def test_without_layers_to_estimate_it_says_so_and_does_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Model()
    model.net[1].eval()
    loader = Loader()
    hook = PreciseBN(1, model, loader, 3)
    with caplog.at_level(logging.INFO, "rethinking_bn"):
        assert hook.update_stats() is None and loader.starts == 0
    assert "PreciseBN is disabled" in caplog.text
    model.net[1].train()
    report = hook.update_stats()  # by hand, without a trainer or a storage
    assert report is not None and report.layers[0].name == "net.1"
    with pytest.raises(ValueError, match="num_iter must be a positive integer, got 0"):
        PreciseBN(1, model, loader, 0)


def test_runs_in_the_precision_of_the_trainer() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    class Outer(HookBase):
        def __init__(self, inner: Any) -> None:
            self._trainer = inner

    for trainer, dtype in (
        (AMPTrainer(model, Loader(), optimizer, precision=torch.bfloat16), torch.bfloat16),
        (AMPTrainer(model, Loader(), optimizer), torch.float16),
        (CPUAutocastTrainer(model, Loader(), optimizer), torch.bfloat16),
        (SimpleTrainer(model, Loader(), optimizer), torch.float32),
    ):
        for candidate in (trainer, Outer(trainer)):  # DefaultTrainer keeps one inside
            hook = PreciseBN(0, model, Loader(), 2)
            hook.trainer = candidate
            model.types.clear()
            with EventStorage():
                hook.update_stats()
            assert model.types == [dtype] * 2


def names(hooks_: list[HookBase | None]) -> list[str]:
    return [type(hook).__module__.split(".")[0] + "." + type(hook).__name__ for hook in hooks_]


@pytest.fixture
def cfg(tmp_path: Path) -> CfgNode:
    return tiny_config(register_data(tmp_path), tmp_path, TEST__PRECISE_BN__ENABLED=True)


def test_takes_the_place_of_detectron2s_hook(cfg: CfgNode) -> None:
    model = Model()
    timer, evaluation = hooks.IterationTimer(), hooks.EvalHook(1, dict)
    stock = hooks.PreciseBN(1, model, Loader(), 1)
    ours = "rethinking_bn.PreciseBN"
    rest = "detectron2.EvalHook"
    given: list[HookBase | None] = [timer, None, stock, evaluation]
    result = with_rethinking_bn(given, cfg, model)
    expected = ["detectron2.IterationTimer", "builtins.NoneType", ours, rest]
    assert names(result) == expected and given[2] is stock
    assert names(with_rethinking_bn(result, cfg, model)) == expected  # once is enough
    assert names(with_rethinking_bn([evaluation, stock], cfg, model)) == [ours, rest]
    merge = MergeStatistics(model, 1)
    assert names(with_rethinking_bn([timer, merge, evaluation], cfg, model))[1] == ours
    assert names(with_rethinking_bn([timer], cfg, model))[1] == ours
    cfg.TEST.PRECISE_BN.ENABLED = False
    assert with_rethinking_bn(given, cfg, model) == given
    cfg.TEST.PRECISE_BN.ENABLED = True
    model.net[1].eval()
    assert with_rethinking_bn(given, cfg, model) == [timer, None, evaluation]


def test_the_list_of_a_lazy_config(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """tools/lazyconfig_train_net.py's hooks; the project's own loader is not described by cfg."""
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    model, loader = Model(), Loader()
    cfg.DATASETS.TRAIN = ()
    given = [hooks.IterationTimer(), None, None, hooks.EvalHook(1, dict), None]
    result = with_rethinking_bn(given, cfg, model, data_loader=loader)
    expected = ["rethinking_bn.PreciseBN", "rethinking_bn.MergeStatistics", "detectron2.EvalHook"]
    assert names(result)[3:6] == expected and len(result) == 7 and len(given) == 5
    again = with_rethinking_bn(result, cfg, model, data_loader=loader)
    assert again == result  # hooks of ours that are there stay, and are not built again
    with pytest.raises(ValueError, match="names a data set"):
        monkeypatch.undo()
        with_rethinking_bn(given, cfg, model)


def population(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if "running_" in k}


def test_detectron2s_retinanet_comes_back_as_it_was(cfg: CfgNode) -> None:
    """Its loss normaliser moves in every training forward, its BN head is called per level."""
    model = build_model(cfg)
    model.loss_normalizer = 41.5
    with EventStorage() as storage:
        report = run_population_training(cfg, model)
        assert storage.latest() == {}
    assert report.labelled and report.unreached == () and report.num_batches == 2
    assert model.loss_normalizer == 41.5 and model.training
    assert all(v == 0 for k, v in model.state_dict().items() if "num_batches_tracked" in k)
    first = population(model)
    # the same again, whatever happened to the random generators, and from eval mode
    torch.manual_seed(3)
    model.eval()
    report = run_population_training(cfg, model)
    torch.testing.assert_close(population(model), first, rtol=0, atol=0)
    assert report.num_batches == 2 and report.frozen == ()
    assert report.drift < 1e-4 and not any(m.training for m in model.modules())


def test_autocast_follows_the_config(cfg: CfgNode) -> None:
    model = build_model(cfg)
    types: list[torch.dtype] = []
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).register_forward_pre_hook(
        lambda m, args: types.append(args[0].dtype)
    )
    run_population_training(cfg, model)
    cfg.SOLVER.AMP.ENABLED = True
    run_population_training(cfg, model)
    assert types == [torch.float32] * 2 + [torch.bfloat16] * 2


class Levels(nn.Module):
    """A head's layer over two levels, one of them empty on rank 1."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = MultiDomainBatchNorm2d(3, 2, population_stats="domain_specific", sync=True)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        ys = self.net([x * self.weight, x[: 0 if x.mean() > 1 else 2]])
        return sum(y.sum() for y in ys)  # type: ignore[return-value]


def train_on_rank(rank: int) -> dict[str, Tensor]:
    model = Levels()
    trainer = SimpleTrainer(model, Loader(rank), torch.optim.SGD(model.parameters(), 0.0))
    trainer.register_hooks([PreciseBN(2, model, Loader(rank), 3)])
    trainer.train(0, 3)
    return population(model)


def run_without_data_on_rank_1(rank: int, folder: str) -> str:
    cfg = tiny_config(register_data(folder), folder)
    if rank == 1:
        cfg.DATASETS.TRAIN = ("nowhere",)
    try:
        run_population_training(cfg, build_model(cfg))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def on_rank(rank: int, folder: str) -> tuple[dict[str, Tensor], str]:
    return train_on_rank(rank), run_without_data_on_rank_1(rank, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Tensor], str]]:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return run_distributed(on_rank, 2, str(folder))


def test_every_rank_ends_with_the_same_statistics(ranks: list[Any]) -> None:
    """Defects 4 and 15: with detectron2's hook the ranks differ, and rank 0's are saved."""
    first, second = (statistics for statistics, _ in ranks)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first["net.0.running_mean"].mean() == pytest.approx(1.0, abs=0.2)
    assert first["net.1.running_mean"].mean() == pytest.approx(0.0, abs=0.2)


def test_a_data_set_missing_on_one_rank_fails_all(ranks: list[Any]) -> None:
    first, second = (said for _, said in ranks)
    assert first.startswith("RuntimeError: another rank failed") and "nowhere" in first
    assert second.startswith("ValueError") and "nowhere" in second
