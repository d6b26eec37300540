"""Inference by mini-batch statistics against references written out, for every BN-like layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from rethinking_bn import layers as ours
from rethinking_bn.population import batch_statistics, freeze_batch_norm
from tests.helpers import run_distributed
from tests.population.cases import Snapshot

C = 3
EPS = 1e-5


def normalized(xs: list[Tensor], *, mean_square: bool = False) -> list[Tensor]:
    """(x - mean) / sqrt(var + eps) per channel, the moments those of all tensors together."""
    values = torch.cat([x.double().transpose(0, 1).flatten(1) for x in xs], dim=1)
    mean = torch.zeros(C).double() if mean_square else values.mean(1)
    var = values.square().mean(1) if mean_square else values.var(1, correction=0)
    shape = (1, C, *[1] * (xs[0].dim() - 2))
    return [(x.double() - mean.view(shape)) / (var.view(shape) + EPS).sqrt() for x in xs]


def assert_normalized(outputs: Any, expected: list[Tensor]) -> None:
    """Compare the outputs of prepared layers with normalised values before the affine."""
    for y, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, (reference * 2 + 0.5).float(), rtol=1e-5, atol=1e-5)


def prepared(layer: Any) -> Any:
    """Trained statistics and an affine that are far from those of the test's inputs."""
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if "running" in name:
                tensor.copy_(torch.rand_like(tensor) + 5)
            if name.endswith("weight"):
                tensor.fill_(2)
            if name.endswith("bias"):
                tensor.fill_(0.5)
    return layer.eval()


def levels() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, C, 4 + i, 5, generator=generator) * (i + 1) + i for i in range(3)]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.BatchNorm1d(C), (4, C, 5)),
        (lambda: nn.BatchNorm2d(C), (4, C, 5, 6)),
        (lambda: nn.BatchNorm3d(C), (4, C, 2, 3, 4)),
        (lambda: nn.SyncBatchNorm(C), (4, C, 5, 6)),
        (lambda: ours.BatchNorm2d(C), (4, C, 5, 6)),
        (lambda: ours.SyncBatchNorm2d(C), (4, C, 5, 6)),
        (lambda: ours.BatchStatNorm2d(C), (4, C, 5, 6)),
        (lambda: ours.MABN2d(C, batch_size=4), (4, C, 5, 6)),
    ],
)
def test_one_tensor(make: Any, shape: tuple[int, ...]) -> None:
    layer, x = prepared(make()), torch.randn(shape) * 3 + 1
    before, stored = Snapshot(layer), layer(x)
    with batch_statistics(layer) as frozen:
        y = layer(x)
        again = layer(x)
    assert_normalized([y], normalized([x], mean_square=isinstance(layer, ours.MABN2d)))
    assert frozen == () and torch.equal(y, again) and torch.equal(layer(x), stored)
    before.assert_unchanged()
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("population_stats", ["shared", "domain_specific"])
@pytest.mark.parametrize("train_stats", ["shared", "domain_specific"])
def test_levels_are_pooled_as_in_training(train_stats: str, population_stats: str) -> None:
    layer = prepared(
        ours.MultiDomainBatchNorm2d(
            C, 3, train_stats=train_stats, population_stats=population_stats, sync=True
        )
    )
    xs, before = levels(), Snapshot(layer)
    with batch_statistics(layer):
        ys = layer(xs)
    expected = normalized(xs) if train_stats == "shared" else [normalized([x])[0] for x in xs]
    assert_normalized(ys, expected)
    before.assert_unchanged()


def test_rows_of_domains() -> None:
    layer, x = prepared(ours.SplitBatchNorm2d(C, 2)), torch.randn(4, C, 5, 5)
    x[1::2] += 3
    with batch_statistics(layer), ours.row_domains(layer, [0, 1, 0, 1]):
        y = layer(x)
    for domain in (0, 1):
        assert_normalized([y[domain::2]], normalized([x[domain::2]]))


def test_cycle_and_mabn_over_levels() -> None:
    cycle, mabn, xs = (
        prepared(ours.CycleBatchNorm2d(C, 3)),
        prepared(ours.MABN2d(C, batch_size=2)),
        levels(),
    )
    model = nn.ModuleList([cycle, mabn])
    with batch_statistics(model):
        with cycle.cycle():
            ys = [cycle(x) for x in xs]
        zs = mabn(xs)
    assert_normalized(ys, [normalized([x])[0] for x in xs])
    assert_normalized(zs, normalized(xs, mean_square=True))


@pytest.mark.parametrize(
    "make", [nn.BatchNorm2d, ours.BatchNorm2d, ours.SyncBatchNorm2d, nn.SyncBatchNorm]
)
def test_nothing_and_one_value(make: Any) -> None:
    layer = prepared(make(C))
    with batch_statistics(layer):
        assert layer(torch.randn(0, C, 4, 4)).shape == (0, C, 4, 4)
        one = layer(torch.randn(1, C, 1, 1))
        torch.testing.assert_close(one, torch.full((1, C, 1, 1), 0.5), rtol=0, atol=1e-4)


def test_frozen_layers_are_left_alone_and_named() -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), ours.BatchNorm2d(C), nn.BatchNorm2d(C))
    model.append(torchvision.ops.FrozenBatchNorm2d(C))
    prepared(model)
    freeze_batch_norm(model[1])
    x = torch.randn(2, C, 4, 4)
    with batch_statistics(model) as frozen:
        assert frozen == ("1", "3")
        y = model[1](x)
        assert not torch.equal(model[0](x), y)
    assert torch.equal(model[1](x), y)


def test_refused_in_training_mode_and_undone_by_an_exception() -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), ours.BatchNorm2d(C)).train()
    with pytest.raises(ValueError, match=r"0 is in training mode"), batch_statistics(model):
        pass
    prepared(model)
    x = torch.randn(2, C, 4, 4)
    expected = model(x)
    with pytest.raises(KeyboardInterrupt), batch_statistics(model):
        raise KeyboardInterrupt
    assert torch.equal(model(x), expected)


def on_rank(rank: int) -> list[Tensor]:
    """Ranks evaluate different numbers of images: nothing may wait for another rank."""
    torch.manual_seed(0)
    multi = ours.MultiDomainBatchNorm2d(C, 2, sync=True)
    layers = [ours.SyncBatchNorm2d(C), nn.SyncBatchNorm(C), multi]
    outputs = []
    for layer in layers:
        prepared(layer)
        with batch_statistics(layer):
            for index in range(rank + 1):
                x = torch.randn(2, C, 4, 4, generator=torch.Generator().manual_seed(index)) + rank
                y = layer([x, x])[0] if layer is multi else layer(x)
        outputs += [x, y]
    return outputs


def test_always_this_ranks_batch() -> None:
    for outputs in run_distributed(on_rank, 2):
        assert_normalized(outputs[1::2], [normalized([x])[0] for x in outputs[::2]])
