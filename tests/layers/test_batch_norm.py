from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import pytest
import torch
from torch import nn

from rethinking_bn.layers import (
    BatchNorm2d,
    BatchStatNorm2d,
    CycleBatchNorm2d,
    MultiDomainBatchNorm2d,
    SyncBatchNorm2d,
    get_norm,
)
from tests import reference
from tests.reference import CHANNELS

OURS = [BatchNorm2d, SyncBatchNorm2d, BatchStatNorm2d]


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_training_equals_torch(kind: type[BatchNorm2d], options: dict, channels_last: bool) -> None:
    mine, theirs = kind(CHANNELS, **options), nn.BatchNorm2d(CHANNELS, **options)
    for step in range(3):
        x = torch.randn(3, CHANNELS, 5, 4, generator=torch.Generator().manual_seed(step)) + 2
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = mine(a), theirs(b)
        reference.loss([y]).backward()
        reference.loss([z]).backward()
        torch.testing.assert_close(y, z)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(dict(mine.state_dict()), dict(theirs.state_dict()))
    torch.testing.assert_close(
        [p.grad for p in mine.parameters()],
        [p.grad for p in theirs.parameters()],
        rtol=1e-4,
        atol=1e-4,
    )
    if kind is not BatchStatNorm2d:
        torch.testing.assert_close(mine.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("kind", OURS)
def test_empty_batch_in_training_leaves_statistics_alone(kind: type[BatchNorm2d]) -> None:
    layer = kind(CHANNELS)
    layer(torch.randn(3, CHANNELS, 2, 2))
    before = copy.deepcopy(layer.state_dict())
    x = torch.zeros(0, CHANNELS, 7, 7, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape and x.grad is not None
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert torch.isfinite(layer.weight.grad).all()
    assert layer.eval()(x).shape == x.shape


def test_batch_statistics_at_inference() -> None:
    layer = BatchStatNorm2d(CHANNELS).eval()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(3, CHANNELS, 5, 4) * 3 + 1
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(CHANNELS)(x))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer.load_state_dict(nn.BatchNorm2d(CHANNELS).state_dict())
    single = layer(torch.randn(1, CHANNELS, 1, 1))
    torch.testing.assert_close(single, torch.zeros_like(single), atol=1e-3, rtol=0)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("sizes", [[4, 0, 2, 3], [3, 3, 3], [9]], ids=["uneven", "even", "one"])
@pytest.mark.parametrize("kind", [BatchNorm2d, BatchStatNorm2d])
def test_row_groups_are_separate_batches(
    kind: type[BatchNorm2d], sizes: list[int], affine: bool, momentum: float | None
) -> None:
    options = {"affine": affine, "momentum": momentum}
    mine, theirs = kind(CHANNELS, **options), nn.BatchNorm2d(CHANNELS, **options)
    for parameter in (*mine.parameters(), *theirs.parameters()):
        nn.init.constant_(parameter, 1.5)
    x = torch.randn(9, CHANNELS, 3, 3) * 2
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with mine.row_groups(sizes):
        y = mine(a)
    z = torch.cat([theirs(rows) for rows in b.split(sizes) if len(rows)])
    reference.loss([y]).backward()
    reference.loss([z]).backward()
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        [p.grad for p in mine.parameters()],
        [p.grad for p in theirs.parameters()],
        rtol=1e-4,
        atol=1e-4,
    )
    torch.testing.assert_close(dict(mine.state_dict()), dict(theirs.state_dict()))
    for wrong in ([4, 4], [5]):
        with pytest.raises(ValueError, match="do not sum up"), mine.row_groups(wrong):
            mine(a)
    with mine.row_groups([]):
        assert len(mine(a[:0])) == 0
    mine(a)  # the bracket left no trace
    seen = []
    with mine.observing(seen.append), mine.row_groups(sizes):
        mine(a)
    torch.testing.assert_close(seen[0].mean[0], reference.values_per_channel([x]).mean(1))
    assert seen[0].count.tolist() == [81.0]


def test_at_inference_nothing_is_observed() -> None:
    layer, seen = BatchStatNorm2d(CHANNELS).eval(), []
    with layer.observing(seen.append):
        layer(torch.randn(2, CHANNELS, 3, 3))
    assert seen == []


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_overflow_does_not_poison_the_moving_averages(momentum: float | None) -> None:
    mine, theirs = (
        BatchNorm2d(CHANNELS, momentum=momentum),
        nn.BatchNorm2d(CHANNELS, momentum=momentum),
    )
    for bad in (None, float("inf"), float("nan"), None):
        x = torch.randn(3, CHANNELS, 2, 2)
        if bad is not None:
            x[0, 1, 0, 0] = bad
        mine(x)
        if bad is None:
            theirs(x)
    torch.testing.assert_close(dict(mine.state_dict()), dict(theirs.state_dict()))


def test_sync_bn_refuses_row_groups() -> None:
    with (
        pytest.raises(ValueError, match="row groups"),
        SyncBatchNorm2d(CHANNELS).row_groups([1, 2]),
    ):
        pass


def test_class_hierarchy_lets_torch_tools_find_them_but_not_as_sync_batch_norm() -> None:
    for kind in OURS:
        assert issubclass(kind, nn.BatchNorm2d) and not issubclass(kind, nn.SyncBatchNorm)
    # such tools would treat it as a layer with one set of statistics
    assert not issubclass(MultiDomainBatchNorm2d, nn.modules.batchnorm._BatchNorm)


@pytest.mark.parametrize("eps", [0.0, -1e-5])
def test_eps_must_be_positive(eps: float) -> None:
    several = functools.partial(MultiDomainBatchNorm2d, num_domains=2)
    for kind in (*OURS, several, functools.partial(CycleBatchNorm2d, num_domains=2)):
        with pytest.raises(ValueError, match=f"eps must be positive, got {eps}"):
            kind(CHANNELS, eps=eps)


def test_wrong_shape() -> None:
    for layer in (BatchNorm2d(CHANNELS), CycleBatchNorm2d(CHANNELS, 2)):
        with pytest.raises(ValueError, match=r"expected \(N, 4, H, W\)"):
            layer(torch.zeros(2, CHANNELS))


def test_get_norm_classes_and_callables() -> None:
    assert isinstance(get_norm("SyncBN", 4), SyncBatchNorm2d)
    assert isinstance(get_norm("BatchStatBN", 4), BatchStatNorm2d)
    assert isinstance(get_norm("BN", 4), nn.BatchNorm2d)
    assert isinstance(get_norm(lambda c: nn.InstanceNorm2d(c), 4), nn.InstanceNorm2d)
    assert get_norm(None, 4) is None and get_norm("", 4) is None
    assert get_norm("BN", 4, eps=0.1).eps == 0.1


def test_get_norm_errors() -> None:
    with pytest.raises(ValueError, match=r"norm must be one of .*SyncBN.*got 'SyncBn'"):
        get_norm("SyncBn", 4)
    with pytest.raises(ValueError, match="do not divide 20 channels"):
        get_norm("GN", 20)


def test_ln_normalises_the_channels_of_each_position() -> None:
    x = torch.randn(2, 32, 3, 3)
    y = get_norm("LN", 32)(x)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 3, 3), atol=1e-5, rtol=0)


def _without_bias(cls: Any) -> nn.Module:
    return cls(CHANNELS, bias=False)


def _without(*names: str, **attributes: Any) -> Any:
    def build(cls: Any) -> nn.Module:
        layer = cls(CHANNELS)
        for name, value in {**dict.fromkeys(names), **attributes}.items():
            setattr(layer, name, value)
        return layer

    return build


DROP_INS = {
    "bias=False": _without_bias,
    "no counter": _without("num_batches_tracked"),
    "no counter, cumulative": _without("num_batches_tracked", "momentum"),
    "no buffers": _without("running_mean", "running_var", "num_batches_tracked"),
    "no statistics": _without("running_mean", "running_var"),
    "no weight": _without("weight"),
    "no bias": _without("bias"),
    "momentum 0": _without(momentum=0.0),
}


@pytest.mark.parametrize("kind", DROP_INS)
@pytest.mark.parametrize("cls", [BatchNorm2d, SyncBatchNorm2d])
def test_attributes_that_torch_s_layer_may_lack(cls: Any, kind: str) -> None:  # defect 27
    if kind == "bias=False" and "bias" not in inspect.signature(nn.BatchNorm2d).parameters:
        pytest.skip("this torch has no BatchNorm2d(bias=False)")
    results = []
    for layer in (DROP_INS[kind](nn.BatchNorm2d).double(), DROP_INS[kind](cls).double()):
        x = torch.randn(2, CHANNELS, 3, 4, generator=torch.Generator().manual_seed(0)).double()
        x.requires_grad_()
        layer(x)
        y = layer(x + 1)
        (y * y.sin()).sum().backward()
        buffers = {k: b for k, b in layer.named_buffers() if kind != "no statistics"}
        gradients = {name: p.grad for name, p in layer.named_parameters()}
        results.append((y, x.grad, gradients, buffers, layer.eval()(x)))
    torch.testing.assert_close(*results)
