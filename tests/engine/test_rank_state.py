"""What is each rank's own: kept for every rank, and statistics merged for all (defect 15)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rethinking_bn.distributed import ALL_GATHER
from rethinking_bn.engine import merge_statistics
from rethinking_bn.engine.rank_state import gather_rank_state, is_due, load_rank_state
from rethinking_bn.layers import (
    CycleBatchNorm2d,
    MultiDomainBatchNorm2d,
    PopulationLayer,
    SyncBatchNorm2d,
)
from tests.helpers import run_distributed


class Detector(nn.Module):
    """Names its moving normaliser as detectron2's dense detectors do."""

    def _ema_update(self) -> None:
        self.loss_normalizer = 42.0


class Keypoints(nn.Module):
    """detectron2's keypoint head has a constant of the same name: not state."""

    loss_normalizer = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.loss_normalizer = 3.0


class Window(nn.Module, PopulationLayer):
    """A layer of ours that keeps a buffer out of the state dict, in a child module too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("recent", torch.zeros(2), persistent=False)
        self.child = nn.Module()
        self.child.register_buffer("recent", torch.zeros(2), persistent=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.detector = Detector()
        self.keypoints = Keypoints()
        self.window = Window()
        self.bn = nn.BatchNorm1d(2)
        self.register_buffer("pixel_mean", torch.zeros(3), persistent=False)
        self.register_buffer("mine", torch.zeros(2, dtype=torch.bfloat16))


def test_what_is_kept_on_one_process() -> None:
    model = Model()
    (state,) = gather_rank_state(model)
    assert state["normalizers"] == {}  # none before the first step
    model.detector._ema_update()
    model.window.recent.fill_(7)
    (state,) = gather_rank_state(model)
    assert state["normalizers"] == {"detector": 42.0}
    assert sorted(state["buffers"]) == ["window.child.recent", "window.recent"]
    other = Model()
    load_rank_state(other, [state])
    assert other.detector.loss_normalizer == 42.0
    assert other.keypoints.loss_normalizer == 3.0
    assert other.window.recent.tolist() == [7.0, 7.0]


def test_another_number_of_ranks_takes_the_part_of_one_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def state(value: float) -> dict[str, Any]:
        buffers = {"window.recent": torch.full((2,), value), "gone": torch.zeros(2)}
        buffers["mine"] = torch.full((2,), value, dtype=torch.bfloat16)
        return {"normalizers": {"detector": value, "gone": 1.0}, "buffers": buffers}

    model = Model()
    load_rank_state(model, [state(2.0), state(4.0), state(6.0)])
    assert "saved by 3" in caplog.text and "resumed by 1" in caplog.text
    assert model.detector.loss_normalizer == 2.0
    assert model.window.recent.tolist() == [2.0, 2.0]
    assert model.mine.tolist() == [0.0, 0.0]  # the state dict has it, of all ranks


def on_rank(rank: int) -> tuple[list[list[str]], bool]:
    model = Model()
    model.detector.loss_normalizer = 10.0 + rank
    model.mine.fill_(rank)
    model.bn.running_mean.fill_(5)
    states = gather_rank_state(model)
    fresh = Model()
    load_rank_state(fresh, states)
    own = fresh.detector.loss_normalizer == 10.0 + rank and fresh.mine.tolist() == [rank, rank]
    return [sorted(state["buffers"]) for state in states], own


def test_each_rank_gets_its_own_back() -> None:
    names = ["mine", "window.child.recent", "window.recent"]  # "bn" is the same on all ranks
    assert run_distributed(on_rank, 2) == [([names, names], True)] * 2


class Norms(nn.Module):
    """Every kind of layer with statistics; one layer has two names, one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.BatchNorm2d(3)
        self.again = self.plain
        self.torch_sync = nn.SyncBatchNorm(3)
        self.sync = SyncBatchNorm2d(2)
        choices = ("train_stats", "population_stats", "affine")
        self.shared = MultiDomainBatchNorm2d(2, 3, **dict.fromkeys(choices, "shared"))
        self.separate = MultiDomainBatchNorm2d(2, 3, **dict.fromkeys(choices, "domain_specific"))
        self.cycle = CycleBatchNorm2d(2, 3)
        self.no_statistics = nn.BatchNorm2d(2, track_running_stats=False)
        self.group = nn.GroupNorm(1, 2)
        self.frozen = nn.BatchNorm2d(2).eval()
        self.equal = nn.BatchNorm2d(5)


def fill(model: nn.Module, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            continue
        if name.startswith("equal"):
            buffer.copy_(torch.linspace(0.1, 1e8, 5))
        else:
            # means far apart, so that the variance of the means matters
            scale = 10.0 if name.endswith("running_mean") else 1.0
            buffer.copy_(torch.rand(buffer.shape, generator=generator) * scale)


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def merged_on(rank: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """Return the buffers before and after merging, and the number of collectives it took."""
    model = Norms()
    fill(model, rank)
    before = buffers(model)
    with patch.object(dist, ALL_GATHER, wraps=getattr(dist, ALL_GATHER)) as gather:
        merge_statistics(model)
    return before, buffers(model), gather.call_count


def test_every_rank_gets_the_mixture() -> None:
    world = 3
    ranks = run_distributed(merged_on, world)
    first = ranks[0][1]
    for before, after, collectives in ranks:
        assert collectives == 1
        for name, value in after.items():
            if name.startswith(("frozen", "equal")) or name.endswith("tracked"):
                assert torch.equal(value, before[name]), name
            else:
                assert torch.equal(value, first[name]), name
    checked = 0
    for name, value in first.items():
        if name.startswith(("frozen", "equal")) or "running" not in name:
            continue
        stem = name.rpartition(".")[0]
        means = [before[f"{stem}.running_mean"].double() for before, _, _ in ranks]
        mean = sum(means) / world
        if name.endswith("running_mean"):
            expected: Any = mean
        else:
            expected = sum(before[name].double() for before, _, _ in ranks) / world
            expected = expected + sum((m - mean) ** 2 for m in means) / world
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=0)
        checked += 1
    assert checked == 2 * (1 + 1 + 1 + 1 + 3 + 3)  # mean and variance; "again" is "plain"


def test_one_process_changes_nothing() -> None:
    model = Norms()
    fill(model, 0)
    before = buffers(model)
    merge_statistics(model)
    for name, value in buffers(model).items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("periods", "due"),
    [((4, 3), [3, 4, 6, 8, 9, 10]), ((4, 0), [4, 8, 10]), ((0, 0), [10]), ((20,), [10])],
)
def test_due_before_checkpoints_evaluations_and_the_end(
    periods: tuple[int, ...], due: list[int]
) -> None:
    trainers = [SimpleNamespace(iter=iteration, max_iter=10) for iteration in range(10)]
    assert [trainer.iter + 1 for trainer in trainers if is_due(trainer, *periods)] == due
