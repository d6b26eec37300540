"""Estimating the statistics of FrozenBatchNorm2d, to adapt a whole detector to another domain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from rethinking_bn.population import estimate_population_statistics
from tests.population.cases import assert_statistics, images, small_net


def twins(kind: Any) -> tuple[Any, Any]:
    """A trained network, and the same with constant statistics, as detection freezes a backbone."""
    net, frozen = small_net().eval(), small_net()
    net[4], frozen[4] = nn.Identity(), nn.Identity()  # no dropout
    for index in (0, 2, 6):
        frozen[index] = kind(net[index].num_features)
        for tensor in (*net[index].parameters(), *net[index].buffers()):
            if tensor.is_floating_point():
                tensor.data.uniform_(0.5, 1.5)
    frozen.load_state_dict(net.state_dict(), strict=False)
    return net, frozen


@pytest.mark.parametrize("kind", [FrozenBatchNorm2d, torchvision.ops.FrozenBatchNorm2d])
def test_estimates_are_those_of_batch_norm(kind: Any) -> None:
    (net, frozen), batches = twins(kind), images(2, 3)
    torch.testing.assert_close(frozen(batches[0]), net(batches[0]))
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    report = estimate_population_statistics(frozen, batches, 2, thaw=True)
    estimate_population_statistics(net.train(), batches, 2)
    assert [layer.name for layer in report.layers] == ["0", "2", "6"] and report.frozen == ()
    assert all(type(frozen[i]) is kind and "forward" not in vars(frozen[i]) for i in (0, 2, 6))
    for name, value in frozen.state_dict().items():
        expected = net.state_dict()[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(value, before[name]) == ("running" not in name)


# defect 22: nobody said that the frozen layers of a backbone are skipped
def test_without_thaw_they_are_named_and_nothing_changes() -> None:
    net = nn.Sequential(FrozenBatchNorm2d(3), nn.BatchNorm2d(3))
    before = net[0].running_mean.clone()
    report = estimate_population_statistics(net, images(2), 1)
    assert report.frozen == ("0",) and torch.equal(net[0].running_mean, before)
    assert "frozen, left alone: 0" in str(report)


@pytest.mark.parametrize("kind", [FrozenBatchNorm2d, torchvision.ops.FrozenBatchNorm2d])
def test_folded_statistics_are_refused_by_name(kind: Any) -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), kind(3))
    net[1].weight.uniform_(0.5, 2)
    with pytest.raises(ValueError, match=r"^1: its mean is 0 and its variance 1.*folded"):
        estimate_population_statistics(net, images(2), 1, thaw=True)
    assert (net[0].running_mean == 0).all()


def test_an_interrupted_run_leaves_the_layer_as_it_was() -> None:
    _, net = twins(FrozenBatchNorm2d)
    x = images(2)[0]
    expected = net(x)

    def forward(model: Any, batch: Tensor) -> None:
        model(batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimate_population_statistics(net, [x], 1, thaw=True, forward=forward)
    assert torch.equal(net(x), expected)


class OfParameters(nn.Module):
    """A constant BatchNorm whose statistics are parameters."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("running_mean", 0.3), ("running_var", 2.0)):
            self.register_parameter(name, nn.Parameter(torch.full((3,), value)))

    def forward(self, x: Tensor) -> Tensor:
        own: Any = (self.running_mean, self.running_var)
        return nn.functional.batch_norm(x, own[0], own[1], training=False)


def test_statistics_that_are_parameters_are_estimated_and_come_back() -> None:
    net, batches = nn.Sequential(OfParameters(), nn.BatchNorm2d(3)), images(2, 3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net[1].register_forward_pre_hook(lambda *_: (torch.full((2, 3, 1, 2), float("inf")),))
    with pytest.raises(FloatingPointError, match="^1: "):
        estimate_population_statistics(net, batches, 2, thaw=True)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    estimate_population_statistics(net[:1], batches, 2, thaw=True)
    assert_statistics(net[0], batches)
