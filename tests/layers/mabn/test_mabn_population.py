"""Population training of MABN2d: the exact mean square in place of its moving average."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rethinking_bn.layers.mabn import CenConv2d, MABN2d
from rethinking_bn.numerics.moments import Moments
from rethinking_bn.population import estimate_population_statistics
from tests.helpers import run_distributed

C = 3


def layer(**options: Any) -> MABN2d:
    return MABN2d(C, simulated_batch_size=4, batch_size=2, warmup_iters=2, **options).double()


def unequal_batches(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1 + i % 3, C, 2 + i, 3, generator=generator, dtype=torch.float64) * (1 + i)
        for i in range(count)
    ]


def mean_square(xs: list[Tensor]) -> Tensor:
    return torch.cat([x.square().transpose(0, 1).flatten(1) for x in xs], dim=1).mean(1)


def test_observed_forwards_change_nothing():
    norm = layer()
    for x in unequal_batches(5):
        norm(x.requires_grad_()).sum().backward()
    before = copy.deepcopy(norm.state_dict())
    seen: list[Moments] = []
    x = unequal_batches(3)[2].requires_grad_()
    with norm.observing(seen.append):
        y = norm(x)
        y.square().sum().backward()
        norm(x[:0])
        norm([x, x[:, :, :1]])
        norm.eval()(x)
        norm.train()
    rms = (mean_square([x]) + norm.eps).sqrt().view(1, -1, 1, 1)
    torch.testing.assert_close(y, x / rms)  # by its own mean square, r = 1
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
    assert norm.iterations == 5 and len(seen) == 3
    assert [m.count.tolist() for m in seen] == [[36.0], [0.0], [45.0]]
    torch.testing.assert_close(seen[0].mean[0], mean_square([x]))
    torch.testing.assert_close(seen[2].mean[0], mean_square([x, x[:, :, :1]]))
    assert all(m.mean.shape == m.m2.shape == (1, C) and not m.m2.any() for m in seen)


def test_reading_and_writing():
    norm = layer()
    new = torch.tensor([[2.0, 3.0, 4.0]], dtype=torch.float64)
    zero = torch.zeros_like(new)
    norm.write_population(Moments(torch.zeros(1), new, zero))
    assert torch.equal(norm.running_mean_square, torch.ones(C, dtype=torch.float64))
    kept = norm.running_mean_square
    norm.float().write_population(Moments(torch.ones(1), new, zero))
    mean, var = norm.read_population()
    assert torch.equal(mean, new.float()) and torch.equal(var, torch.zeros(1, C))
    assert norm.population_domains == ("",)
    mean.zero_()
    assert norm.running_mean_square.all() and kept is not norm.running_mean_square


def test_estimate():
    """Pooled over unequal batches and both uses; deeper layers see mini-batch normalised input."""
    torch.manual_seed(0)
    shared, last, unused = layer(), layer(), layer()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = CenConv2d(C, C, 1, bias=False).double()
            self.shared, self.last, self.unused = shared, last, unused

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.last(self.shared(x) + self.shared(2 * x))

    model = Model()
    batches = unequal_batches(6)
    estimate_population_statistics(model, batches, 6, labelled=True, progress=False)
    features = [model.conv(x) for x in batches]
    torch.testing.assert_close(
        shared.running_mean_square, mean_square([f for x in features for f in (x, 2 * x)])
    )

    def normalized(x: Tensor) -> Tensor:
        return x / (mean_square([x]) + 1e-5).sqrt().view(1, -1, 1, 1)

    seen = [normalized(x) + normalized(2 * x) for x in features]
    torch.testing.assert_close(last.running_mean_square, mean_square(seen))
    assert torch.equal(unused.running_mean_square, torch.ones(C, dtype=torch.float64))
    assert shared.iterations == last.iterations == 0


def test_frozen_layers_are_left_alone():
    frozen, trained = layer().freeze(), layer()
    model = nn.Sequential(frozen, trained)
    report = estimate_population_statistics(
        model, unequal_batches(2), 2, labelled=True, progress=False
    )
    assert frozen.running_mean_square.eq(1).all() and not frozen.training
    assert not trained.running_mean_square.eq(1).any()
    assert list(report.frozen) == ["0"]


def _estimate(rank: int) -> Tensor:
    norm = layer()
    for x in unequal_batches(4, seed=rank):  # ranks that differ
        norm(x)
    batches = unequal_batches(6)[rank::2]
    estimate_population_statistics(norm, batches, 3, labelled=True, progress=False)
    return norm.running_mean_square


def test_ranks_end_with_the_same_statistics():
    a, b = run_distributed(_estimate, 2)
    assert torch.equal(a, b)
    torch.testing.assert_close(a, mean_square(unequal_batches(6)))
