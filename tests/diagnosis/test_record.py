"""What a record sums up equals a reference in float64, wherever the moments come from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rethinking_bn.diagnosis.distance import Scatter, scattering
from rethinking_bn.diagnosis.record import Record, find_layers
from rethinking_bn.layers import BatchNorm2d

FORWARDS = 70  # more than two blocks


def forwards(shape: tuple[int, ...]) -> list[list[Tensor]]:
    """Of each forward the inputs of its calls: one or two, of one to four images."""
    g = torch.Generator().manual_seed(0)
    return [
        [
            torch.randn(1 + (i + use) % 4, *shape, generator=g) * 3 + 50 + i % 5
            for use in range(1 + i % 2)
        ]
        for i in range(FORWARDS)
    ]


@pytest.mark.parametrize(
    ("norm", "shape", "frozen"),
    [
        (nn.BatchNorm2d, (3, 4, 5), False),
        (nn.BatchNorm2d, (3, 4, 5), True),
        (nn.BatchNorm1d, (3,), False),
        (BatchNorm2d, (3, 4, 5), False),
        (lambda c: nn.BatchNorm2d(c, track_running_stats=False), (3, 4, 5), False),
    ],
    ids=["torch", "frozen", "vectors", "ours", "no-statistics"],
)
def test_sums_equal_a_reference(
    norm: Callable[[int], nn.Module], shape: tuple[int, ...], frozen: bool
) -> None:
    layer = norm(3).train(not frozen)
    seen = forwards(shape)
    if len(shape) == 1:  # torch refuses a batch of one value per channel
        seen = [[x.repeat(2, 1) for x in calls] for calls in seen]
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    ((watched,), _) = find_layers(nn.ModuleList([layer]))
    watched.frozen, watched.from_buffers = frozen, watched.from_buffers and not frozen
    watched.record = record = Record(watched)
    with torch.no_grad(), watched.watching():
        for calls in seen:
            for x in calls:
                layer(x)
            record.end_of_forward()
    for name in ("running_mean", "running_var"):
        assert name not in before or torch.equal(layer.state_dict()[name], before[name])
    record.merge([record.state()])
    assert record.forwards == FORWARDS and record.uses == 2
    for use in range(2):
        inputs = [calls[use].double() for calls in seen if len(calls) > use]
        inputs = [x.reshape(*x.shape[:2], -1) for x in inputs]
        values = torch.cat([x.transpose(0, 1).flatten(1) for x in inputs], 1)
        exact = record["exact"]
        assert exact.count[use] == values.shape[1]
        torch.testing.assert_close(exact.mean[use], values.mean(1), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            exact.variance()[use], values.var(1, correction=0), rtol=1e-5, atol=0
        )
        means = torch.stack([x.mean((0, 2)) for x in inputs])
        torch.testing.assert_close(record.scatter("mean")[use], means.var(0), rtol=1e-4, atol=0)
        squares = sum((x.mean(2) - x.mean((0, 2))).square().sum(0) for x in inputs)
        within = squares / sum(len(x) - 1 for x in inputs)
        torch.testing.assert_close(record["within"].mean[use], within, rtol=1e-4, atol=0)


def scattering_of(shared: float) -> tuple[float, float, float]:
    """Return excess, F and z of independent images plus what a batch has in common."""
    g = torch.Generator().manual_seed(1)
    ((layer,), _) = find_layers(nn.ModuleList([nn.BatchNorm2d(4)]))
    scatter, record = Scatter(layer), Record(layer)
    with torch.no_grad():
        for _ in range(200):
            image = torch.randn(8, 4, 1, 1, generator=g)
            x = image + shared * torch.randn(4, 1, 1, generator=g) + torch.zeros(8, 4, 2, 2)
            for watcher in (scatter, record):
                layer.record = watcher
                layer.layer.train(watcher is record)
                with layer.watching():
                    layer.layer(x)
                watcher.end_of_forward()
    verdict, f = scattering(layer, record.merge([record.state()]), [scatter.summary()] * 2)
    return verdict.effect, f, verdict.z


def test_the_variance_ratio_of_independent_images_is_one() -> None:
    effect, f, z = scattering_of(0.0)
    assert abs(f - 1) < 0.15 and z < 3 and effect == 0
    # 8 images: 1 + 8 · 0.5²; in standard deviations of the values, sqrt(1.25)
    effect, f, z = scattering_of(0.5)
    assert abs(f - 3) < 0.4 and z > 10 and effect == pytest.approx(0.5 / 1.25**0.5, abs=0.05)
