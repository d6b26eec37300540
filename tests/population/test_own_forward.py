"""Layers that train by a forward of their own, foreign norms, and layers whose tracking is off."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rethinking_bn.diagnosis import diagnose
from rethinking_bn.layers import BatchNorm2d
from rethinking_bn.population import (
    batch_statistics,
    estimate_population_statistics,
    freeze_batch_norm,
    unfreeze_batch_norm,
)
from tests.population.cases import FirstHalf, Masked, Snapshot, assert_statistics, images


class NormAct(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class OursAndAct(BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Ghost(nn.BatchNorm2d):
    """Pieces of two samples, whose average moves the statistics."""

    running_mean: Any
    running_var: Any

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        pieces = x.split(2)
        with torch.no_grad():
            means = torch.stack([piece.mean((0, 2, 3)) for piece in pieces])
            variances = torch.stack([piece.var((0, 2, 3)) for piece in pieces])
            self.running_mean.lerp_(means.mean(0), self.momentum)
            self.running_var.lerp_(variances.mean(0), self.momentum)
        return torch.cat([F.batch_norm(piece, None, None, training=True) for piece in pieces])


class Foreign(nn.Module):
    """BatchNorm that is no subclass of torch's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.momentum = 0.1
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        own: tuple[Any, Any] = (self.running_mean, self.running_var)
        return F.batch_norm(x, *own, None, None, self.training, self.momentum, 1e-3)


def of_batches(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Weigh batches (C, n) alike: mean of their means, of their variances plus means' spread."""
    means = torch.stack([v.double().mean(1) for v in values])
    variances = torch.stack([v.double().var(1) for v in values])
    return means.mean(0), variances.mean(0) + means.var(0, correction=0)


def flat(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)


def assert_close(layer: Any, mean: Tensor, var: Tensor) -> None:
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [NormAct, OursAndAct, FirstHalf, Foreign])
@pytest.mark.parametrize("old", [0.0, 7.0, float("nan")])
def test_statistics_are_what_the_layer_leaves_batch_after_batch(kind: Any, old: float) -> None:
    model: Any = nn.Sequential(kind(3))
    model[0].running_mean.fill_(old)
    batches = images(*[4, 2, 6] * 12)
    before = Snapshot(model)
    report = estimate_population_statistics(model, batches)
    before.assert_unchanged(buffers=False)
    halves = kind is FirstHalf
    assert_close(model[0], *of_batches([flat(x.chunk(2)[0] if halves else x) for x in batches]))
    if halves:  # torch's layer inside is estimated as ever
        assert_statistics(model[0].second, [x.chunk(2)[1] for x in batches], atol=1e-5)
    assert report.from_buffers == ("0",) and report.layers[0].samples == len(batches)
    assert "forward of their own" in str(report)


def test_ghost_batches_and_padding() -> None:
    ghost, batches = Ghost(3), images(4, 2, 6)
    estimate_population_statistics(ghost, batches, 3)
    means, variances = [], []
    for x in batches:
        pieces = [flat(piece).double() for piece in x.split(2)]
        means.append(torch.stack([piece.mean(1) for piece in pieces]).mean(0))
        variances.append(torch.stack([piece.var(1) for piece in pieces]).mean(0))
    stacked = torch.stack(means)
    var = torch.stack(variances).mean(0) + stacked.var(0, correction=0)
    assert_close(ghost, stacked.mean(0), var)

    masked, pairs = Masked(3), []
    for length in (3, 5, 2):
        mask = (torch.arange(6) < length).float()[None, None].expand(2, 1, 6)
        pairs.append((torch.randn(2, 3, 6) + length, mask))
    estimate_population_statistics(masked, pairs, forward=lambda model, batch: model(*batch))
    assert_close(masked, *of_batches([flat(x[:, :, : int(mask[0].sum())]) for x, mask in pairs]))


def test_instance_norm_with_statistics_is_found() -> None:
    layer: Any = nn.InstanceNorm2d(3, track_running_stats=True)
    x = images(4)[0]
    report = estimate_population_statistics(layer, [x])
    assert [entry.name for entry in report.layers] == [""]
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    expected = x.flatten(2).var(2).mean(0)
    torch.testing.assert_close(layer.running_var, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        trained = layer(x)
    with batch_statistics(layer.eval()):
        torch.testing.assert_close(layer(x), trained)


def test_a_layer_that_leaves_nothing_is_kept_and_named(caplog: pytest.LogCaptureFixture) -> None:
    class Constant(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:  # with an activation: not known as constant
            own: Any = (self.running_mean, self.running_var)
            return F.batch_norm(x, own[0], own[1], training=False).relu()

    model = nn.Sequential(Constant(3), nn.BatchNorm2d(3))
    with caplog.at_level(logging.WARNING):
        report = estimate_population_statistics(model, images(2, 3), 2)
    assert report.unreached == ("0",) and "0" in caplog.text


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNorm2d])
def test_a_layer_whose_tracking_was_switched_off(kind: Any) -> None:
    """It trains by mini-batches and infers by its buffers (Lightning's way of freezing)."""
    model: Any = nn.Sequential(kind(3))
    model[0].track_running_stats = False
    batches = images(2, 4, 3)
    with torch.no_grad():
        trained = model(batches[0])
    before = Snapshot(model)
    estimate_population_statistics(model, batches, 3)
    before.assert_unchanged(buffers=False)
    assert_statistics(model[0], batches)
    with batch_statistics(model.eval()) as kept:
        torch.testing.assert_close(model(batches[0]), trained, rtol=1e-5, atol=1e-5)
    assert kept == ()
    stored = model(batches[0])
    assert freeze_batch_norm(model.train()) == ["0"]
    assert torch.equal(model(batches[0]), stored)
    unfreeze_batch_norm(model)


# the forward of Masked has another signature, and its eval mode reads the buffers itself
@pytest.mark.parametrize("kind", [NormAct, FirstHalf, Ghost, Foreign, Masked])
def test_batch_statistics_are_those_of_training(kind: Any) -> None:
    layer = kind(3)
    inputs: Any = (images(4)[0],)
    if kind is Masked:
        inputs = (torch.randn(4, 3, 6), torch.ones(4, 1, 6))
    with torch.no_grad():
        trained = layer(*inputs)
    stored, before = layer.eval()(*inputs), Snapshot(layer)
    with torch.no_grad(), batch_statistics(layer):
        torch.testing.assert_close(layer(*inputs), trained, rtol=1e-5, atol=1e-5)
        assert not layer.training
    assert torch.equal(layer(*inputs), stored) and "forward" not in vars(layer)
    before.assert_unchanged()


class InPlaceActivated(Foreign):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu_(super().forward(x))


def test_what_is_not_known_to_be_batch_norm_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(InPlaceActivated(3))
    with pytest.raises(ValueError, match="left alone: 0 .*InPlaceActivated.*formula"):
        estimate_population_statistics(model, images(2), 1)
    model.append(nn.BatchNorm2d(3))
    report = estimate_population_statistics(model, images(2), 1)
    assert "InPlaceActivated" in report.left[0] and "InPlaceActivated" in str(report)
    caplog.clear()
    assert freeze_batch_norm(model) == ["1"] and "InPlaceActivated" in caplog.text
    with batch_statistics(model.eval()) as kept:
        assert kept == ("1", "0")


class OtherMomentum(nn.BatchNorm2d):
    """Its momentum is a constant of its forward, or follows TensorFlow's convention."""

    def __init__(self, constant: bool) -> None:
        super().__init__(3)
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        own = (self.running_mean, self.running_var, self.weight, self.bias)
        rate = 0.1 if self.constant else 1 - self.momentum
        return F.batch_norm(x, *own, self.training, rate, self.eps).relu()


@pytest.mark.parametrize("constant", [True, False])
def test_a_momentum_that_is_not_the_attribute(constant: bool) -> None:
    layer, batches = OtherMomentum(constant), images(4, 2, 6)
    layer.running_mean.fill_(7.0)
    estimate_population_statistics(layer, batches)
    assert_close(layer, *of_batches([flat(x) for x in batches]))
    assert layer.momentum == 0.1
    # diagnose reads such a layer likewise
    assert {f.severity for f in diagnose(layer, batches, output_batches=0).findings} == {"ok"}
