"""State that is each rank's own: found, kept for every rank, averaged for another number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rethinking_bn.engine.rank_state import gather_rank_state, load_rank_state
from rethinking_bn.layers import PopulationLayer
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
        self.register_buffer("steps", torch.tensor(0))
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


def test_another_number_of_ranks_takes_the_mean_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def state(value: float) -> dict[str, Any]:
        return {
            "normalizers": {"detector": value, "gone": 1.0},
            "buffers": {
                "window.recent": torch.tensor([value, 0.0]),
                "steps": torch.tensor(int(value)),
                "gone": torch.zeros(2),
                "mine": torch.full((2,), value, dtype=torch.bfloat16),
            },
        }

    model = Model()
    load_rank_state(model, [state(2.0), state(4.0), state(6.0)])
    assert "saved by 3" in caplog.text and "resumed by 1" in caplog.text
    assert model.detector.loss_normalizer == 4.0
    assert model.window.recent.tolist() == [4.0, 0.0]
    assert model.steps.item() == 2  # a counter has no mean: rank 0's
    assert model.mine.tolist() == [4.0, 4.0]


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
