"""Population training of the package's own layers, in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rethinking_bn import layers as ours
from rethinking_bn.population import estimate_population_statistics
from tests.population.cases import Snapshot, assert_statistics, each_level, images


@pytest.mark.parametrize("train_stats", ["shared", "domain_specific"])
@pytest.mark.parametrize("population_stats", ["shared", "domain_specific"])
def test_multi_domain(train_stats: Any, population_stats: Any) -> None:
    layer: Any = ours.MultiDomainBatchNorm2d(
        3, 3, train_stats=train_stats, population_stats=population_stats
    )
    batches = [images(2, 1, 3, seed=s) for s in range(4)]
    outputs: list[list[Tensor]] = []
    layer.register_forward_hook(lambda m, args, out: outputs.append(out))
    report = estimate_population_statistics(layer, batches, 4, labelled=True)
    levels = [[batch[level] for batch in batches] for level in range(3)]
    if population_stats == "shared":
        assert_statistics(layer, sum(levels, []))
        pooled = batches[0]
    else:
        for state, inputs in zip(layer.children(), levels, strict=True):
            assert_statistics(state, inputs)
        pooled = batches[0][:1]
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in pooled], 1)
    mean, var = values.mean(1), values.var(1, correction=0)
    # it normalised in the population paradigm, whatever it trains by
    expected = (batches[0][0] - mean[:, None, None]) / (var + layer.eps).sqrt()[:, None, None]
    torch.testing.assert_close(outputs[0][0], expected, rtol=1e-4, atol=1e-5)
    assert [r.domain for r in report.layers] == list(layer.population_domains)
    layer(batches[0])  # and trains again afterwards
    assert all(m.num_batches_tracked > 0 for m in layer.modules() if hasattr(m, "running_mean"))


def test_an_empty_domain_is_kept_and_named() -> None:
    layer: Any = ours.MultiDomainBatchNorm2d(3, 2, population_stats="domain_specific")
    batch = [images(2)[0], torch.empty(0, 3, 2, 2)]
    report = estimate_population_statistics(
        nn.ModuleDict({"norm": layer}), [batch], 1, forward=lambda m, b: m["norm"](b)
    )
    assert report.unreached == ("norm[1]",)
    first, second = layer.children()
    assert_statistics(first, batch[:1])
    assert (second.running_mean == 0).all() and (second.running_var == 1).all()


def test_cycle_layer_and_an_interrupted_cycle() -> None:
    norm = ours.CycleBatchNorm2d(3, 3)
    batches = [images(2, 1, 3, seed=s) for s in range(3)]
    estimate_population_statistics(norm, batches, 3, forward=each_level)
    for level, state in enumerate(norm.children()):
        assert_statistics(state, [batch[level] for batch in batches])
    before = Snapshot(norm)
    with pytest.raises(ValueError, match="ended after 1 of 2 batches"):
        estimate_population_statistics(norm, [batches[0][:2]], 2, forward=each_level)
    before.assert_unchanged()  # the cycle's counter included


@pytest.mark.parametrize("kind", [ours.SyncBatchNorm2d, ours.BatchStatNorm2d])
def test_drop_in_layers(kind: Callable[[int], nn.BatchNorm2d]) -> None:
    layer, batches = kind(3), [*images(2, 3), torch.ones(1, 3, 1, 1), torch.empty(0, 3, 2, 2)]
    estimate_population_statistics(layer, batches, 4)
    assert_statistics(layer, batches)
    assert layer.num_batches_tracked == 0


def test_one_value_per_channel_keeps_the_variance() -> None:
    layer: Any = ours.SyncBatchNorm2d(3)
    layer.running_var.fill_(5.0)
    estimate_population_statistics(layer, [torch.full((1, 3, 1, 1), 2.0)], 1)
    assert (layer.running_mean == 2).all() and (layer.running_var == 5).all()


def test_the_drift_of_a_mean_square() -> None:  # its value: layers/mabn
    layer = ours.MABN2d(3)
    report = estimate_population_statistics(layer, images(2, 3), 2)
    new = layer.running_mean_square
    drift = (1 - new.sqrt()).abs() / (new + layer.eps).sqrt()
    assert report.layers[0].drift_mean == pytest.approx(drift.mean().item(), rel=1e-4)
