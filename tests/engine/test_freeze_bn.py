"""The hook that freezes BN-like layers near the end; its resume is tested in test_resume.py."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from torch import Tensor, nn

from rethinking_bn.config import needs_population_loader
from rethinking_bn.engine import FreezeBN, PreciseBN, with_rethinking_bn
from rethinking_bn.engine.check_config import check_values
from rethinking_bn.engine.rank_state import wrap_data_parallel
from rethinking_bn.layers import MABN2d, MultiDomainBatchNorm2d
from rethinking_bn.population import estimate_population_statistics
from tests.engine.tiny import tiny_config
from tests.helpers import run_distributed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), MABN2d(4, batch_size=4))
        kind = {"train_stats": "domain_specific", "population_stats": "domain_specific"}
        self.norm = MultiDomainBatchNorm2d(4, 2, **kind)
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        a, b = self.norm([x, x[:, :, ::2]])
        return {"loss": (a + 0.1 * a**2).square().mean() + b.sin().mean()}


class Loader:
    """Batches of one rank of ``world``; every start yields the same ones, without end."""

    def __init__(self, seed: int, rank: int = 0, world: int = 1) -> None:
        self.seed, self.share = seed, slice(rank * 8 // world, (rank + 1) * 8 // world)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield torch.randn(8, 3, 4, 4, generator=generator).double()[self.share] + 1


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if "running_" in k}


def affine(model: nn.Module) -> list[Tensor]:
    layers = [model.get_submodule(name) for name in ("stem.1", "stem.2", "norm")]
    return [p.detach().clone() for layer in layers for p in layer.parameters()]


class Evaluation(HookBase):
    """What detectron2's evaluation does to the modes of a model; keeps the statistics after it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: list[dict[str, Tensor]] = []

    def after_step(self) -> None:
        self.model.eval()
        self.model.train()
        self.seen.append(statistics(self.model))


def train(model: nn.Module, loader: Loader, hooks: list[HookBase], steps: int = 4) -> SimpleTrainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    trainer = SimpleTrainer(model, loader, optimizer)
    trainer.register_hooks(hooks)
    trainer.train(0, steps)
    return trainer


class Reference(HookBase):
    """Estimates on a copy of the model, before the hook under test."""

    def before_step(self) -> None:
        if self.trainer.iter == 2:
            self.model = copy.deepcopy(self.trainer.model)
            estimate_population_statistics(self.model, Loader(5), 3)


def test_statistics_are_estimated_at_start_and_stay() -> None:
    model, reference = Model(), Reference()
    evaluation = Evaluation(model)
    hook = FreezeBN(2, model, Loader(5), 3)
    train(model, Loader(1), [reference, hook, evaluation])
    expected = statistics(reference.model)
    assert len(expected) == 2 + 1 + 2 * 2
    for name, value in expected.items():
        assert not torch.equal(evaluation.seen[0][name], evaluation.seen[1][name])
        for seen in evaluation.seen[2:]:
            assert torch.equal(seen[name], value), name
    # what is trained on is inference's normalisation, and the affine is trained
    x = next(iter(Loader(9)))
    assert torch.equal(model.train()(x)["loss"], model.eval()(x)["loss"])
    before = affine(reference.model)
    assert all(not torch.equal(a, b) for a, b in zip(before, affine(model), strict=True))


def test_without_a_loader_what_is_stored_is_frozen() -> None:
    model = Model()
    evaluation = Evaluation(model)
    train(model, Loader(1), [FreezeBN(2, model), evaluation])
    for name, value in evaluation.seen[1].items():
        assert torch.equal(evaluation.seen[3][name], value)


def test_the_affine_too() -> None:
    model = Model()
    before = affine(model)
    weight = model.stem[0].weight.detach().clone()
    train(model, Loader(1), [FreezeBN(0, model, affine=True)])
    assert all(torch.equal(a, b) for a, b in zip(before, affine(model), strict=True))
    assert not torch.equal(model.stem[0].weight, weight)


def on_rank(rank: int, start: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    model = Model()
    wrapped = wrap_data_parallel(model)
    evaluation = Evaluation(model)
    hooks = [FreezeBN(start, wrapped, Loader(5, rank, 2), 3, affine=True), evaluation]
    affines = []

    class Watch(HookBase):
        def after_step(self) -> None:
            affines.append(torch.cat([p.flatten() for p in affine(model)]))

    train(wrapped, Loader(1, rank, 2), [*hooks, Watch()])
    return [*(p.detach() for p in model.parameters()), *affines], evaluation.seen


def test_two_processes_do_not_wait_for_gradients_of_what_is_frozen() -> None:
    first, second = run_distributed(on_rank, 2, 2)
    for a, b in zip(first[0], second[0], strict=True):
        assert torch.equal(a, b)
    affines = first[0][-4:]
    assert not torch.equal(affines[0], affines[1]) and torch.equal(affines[1], affines[3])
    assert first[1][2].keys() == second[1][2].keys()
    for name, value in first[1][2].items():
        assert torch.equal(value, second[1][2][name]) and torch.equal(value, first[1][3][name])


def from_the_start(rank: int) -> list[Tensor]:
    return on_rank(rank, 0)[0]


def test_two_processes_take_the_steps_of_one() -> None:
    """Frozen from the start, a step depends on the images alone, not on how they are spread."""

    class InTurn(Loader):
        """The two ranks' batches of population training, one after the other."""

        def __iter__(self) -> Iterator[Tensor]:
            for batch in super().__iter__():
                yield from batch.chunk(2)

    model = Model()
    train(model, Loader(1), [FreezeBN(0, model, InTurn(5), 6, affine=True)])
    expected = [p.detach() for p in model.parameters()]
    found = run_distributed(from_the_start, 2)[1]
    for a, b in zip(found, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("start", "state", "said"),
    [(1, {}, "iteration 3 unfrozen.* 1"), (6, {"frozen": True}, "iteration 3 frozen.* 6")],
)
def test_resumed_with_another_start(
    start: int, state: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It freezes at once: what should have been frozen, and what was."""
    model = Model()
    trainer = SimpleTrainer(model, Loader(1), torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.register_hooks([FreezeBN(start, model)])
    trainer._hooks[0].load_state_dict(state)
    before = statistics(model)
    trainer.train(3, 5)
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)
    assert trainer.state_dict()["hooks"] == {"FreezeBN": {"frozen": True}}
    assert re.search(said, caplog.text)
    with pytest.raises(ValueError, match="start must not be negative, got -1"):
        FreezeBN(-1, model)


def test_keys(caplog: pytest.LogCaptureFixture) -> None:
    cfg: Any = tiny_config("", "out")
    model = Model()
    assert with_rethinking_bn([], cfg, model) == [] and not needs_population_loader(cfg)
    cfg.SOLVER.FREEZE_BN.START = 4
    assert needs_population_loader(cfg) and not needs_population_loader(cfg, training=False)
    check_values(cfg, 1)
    (hook,) = with_rethinking_bn([], cfg, model, data_loader=Loader(1))
    assert isinstance(hook, FreezeBN)
    cfg.TEST.PRECISE_BN.ENABLED = True
    both = with_rethinking_bn([], cfg, model, data_loader=Loader(1))
    assert [type(h) for h in both] == [PreciseBN, FreezeBN]
    for start in (-2, 6):
        cfg.SOLVER.FREEZE_BN.START = start
        with pytest.raises(ValueError, match=rf"FREEZE_BN.START .*\[0, 6\), got {start}"):
            check_values(cfg, 1)
