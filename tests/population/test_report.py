"""What population training tells: its report and its progress."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from rethinking_bn.layers import MultiDomainBatchNorm2d
from rethinking_bn.population import estimate_population_statistics
from tests.population.cases import images, seen_statistics, small_net


def test_report() -> None:
    model: Any = nn.Sequential(nn.BatchNorm2d(3))
    model.norm = MultiDomainBatchNorm2d(2, 2, population_stats="domain_specific")
    model[0].running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    model[0].running_var.copy_(torch.tensor([1.0, 4.0, 9.0]))
    x = images(4)[0]
    report = estimate_population_statistics(model, [x], 1, forward=lambda m, b: m[0](b))
    mean, var = seen_statistics([x])
    drift = (torch.tensor([1.0, 2.0, 3.0]) - mean).abs() / (var + 1e-5).sqrt()
    ratio = ((torch.tensor([1.0, 4.0, 9.0]) + 1e-5) / (var + 1e-5)).prod() ** (1 / 3)
    first = report.layers[0]
    assert (first.name, first.domain, first.samples) == ("0", "", 4 * 6 * 8)
    assert first.drift_mean == pytest.approx(drift.mean().item(), rel=1e-4)
    assert first.drift_max == pytest.approx(drift.max().item(), rel=1e-4)
    assert first.variance_ratio == pytest.approx(ratio.item(), rel=1e-4)
    assert report.drift == first.drift_max and report.drift_mean == first.drift_mean
    assert report.num_batches == 1 and report.world_size == 1 and report.seconds > 0
    lines = str(report).splitlines()
    assert lines[1].split() == "layer domain samples drift mean drift max old/new var".split()
    assert lines[2].split()[:3] == ["0", "-", "192"] and lines[4].split()[:3] == ["norm", "1", "0"]
    assert lines[-1].endswith("norm[0], norm[1]")
    again = estimate_population_statistics(model, [x], 1, forward=lambda m, b: m[0](b))
    assert again.drift < 1e-5 and again.layers[0].variance_ratio == pytest.approx(1, rel=1e-5)


def test_progress_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rethinking_bn.population.forwards._SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO, "rethinking_bn.population"):
        estimate_population_statistics(small_net(), images(2, 2, 2), 3, progress=False)
        assert caplog.text == ""
        loader = iter(images(2, 2, 2, 2))
        estimate_population_statistics(small_net(), loader, 3)
    assert len(list(loader)) == 1  # only as many are taken
    assert "3 layers: 3 batches per rank" in caplog.text and "2 of 3 batches" in caplog.text
    assert "eta 0:00:00" in caplog.text and "3 sets from 3 labelled batches" in caplog.text
