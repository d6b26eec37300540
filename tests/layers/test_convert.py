"""Norms exchanged in models of torch and torchvision; detectron2's are in its own file."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50
from torchvision.ops import FrozenBatchNorm2d

from rethinking_bn.layers import (
    BatchNorm2d,
    BatchStatNorm2d,
    CenConv2d,
    CycleBatchNorm2d,
    MABN2d,
    MultiDomainBatchNorm2d,
    SyncBatchNorm2d,
    convert_norms,
    get_norm,
    norm_names,
)
from rethinking_bn.layers.frozen import freeze_layer, is_frozen
from tests.layers.test_bn_like import NormAct, parametrized

BATCH_NORMS = {
    "BN": BatchNorm2d,
    "SyncBN": SyncBatchNorm2d,
    "BatchStatBN": BatchStatNorm2d,
    "FrozenBN": FrozenBatchNorm2d,
}
STATISTICS = ("running_mean", "running_var")


def trained(layer: nn.Module) -> nn.Module:
    """Give a layer an affine and statistics that are not the initial ones."""
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return layer


def batch_norms() -> list[nn.Module]:
    layers = [nn.BatchNorm2d(4), nn.SyncBatchNorm(4), FrozenBatchNorm2d(4)]
    return [trained(layer) for layer in [*layers, BatchNorm2d(4), SyncBatchNorm2d(4)]]


@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_among_kinds_of_bn_everything_is_carried_over(kind: str) -> None:
    for old in batch_norms():
        old.eps = 1e-3
        model = nn.Sequential(nn.Conv2d(3, 4, 1), old).eval()
        x = torch.randn(2, 3, 5, 5)
        expected = {k: v for k, v in model.state_dict().items() if "tracked" not in k}
        with torch.no_grad():
            before = old.double()(model[0](x).double()) if kind != "BatchStatBN" else None
            old.float()
            assert convert_norms(model, kind) is model
            assert type(model[1]) is BATCH_NORMS[kind] and model[1].eps == 1e-3
            assert not model[1].training
            state = model.state_dict()
            assert all(torch.equal(state[key], value) for key, value in expected.items())
            if before is not None:
                y = model[1].double()(model[0](x).double())
                torch.testing.assert_close(y, before)


def test_momentum_counter_group_and_absent_affine_are_carried_over() -> None:
    old = nn.SyncBatchNorm(4, momentum=None, affine=False)
    old.num_batches_tracked.fill_(7)
    new = convert_norms(old, "BN")
    assert isinstance(new, BatchNorm2d) and new.momentum is None and new.weight is None
    assert new.num_batches_tracked == 7
    assert convert_norms(nn.BatchNorm2d(4, momentum=0.5), "SyncBN", momentum=0.2).momentum == 0.2
    without = convert_norms(nn.BatchNorm2d(4, track_running_stats=False), "SyncBN")
    assert without.running_mean is None
    for name in ("GN", "LN", "IN"):
        options = {"num_groups": 2} if name == "GN" else {}
        assert not list(convert_norms(nn.BatchNorm2d(4, affine=False), name, **options).buffers())
        assert not list(
            convert_norms(nn.BatchNorm2d(4, affine=False), name, **options).parameters()
        )


def test_rows_at_a_time_are_carried_over_where_they_can_be(caplog: Any) -> None:
    model = nn.Sequential(BatchNorm2d(4), BatchNorm2d(4))
    model[0].rows_at_a_time = 2
    convert_norms(model, "BatchStatBN")
    assert [layer.rows_at_a_time for layer in model] == [2, 0]
    with caplog.at_level(logging.INFO, "rethinking_bn"):
        convert_norms(model, "SyncBN")(torch.randn(3, 4, 2, 2))
    assert "1 SyncBN layers normalise all rows together now" in caplog.text


def test_mode_device_type_and_gradients_are_carried_over() -> None:
    old = nn.BatchNorm2d(4, device="meta", dtype=torch.float64).eval()
    old.weight.requires_grad_(False)
    new = convert_norms(old, "IN")
    assert new.weight is old.weight and new.bias is old.bias  # an optimizer may hold them
    assert new.weight.device.type == "meta" and new.weight.dtype == torch.float64
    assert not new.training and not new.weight.requires_grad and new.bias.requires_grad


def test_resnet50_becomes_mabn_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    network = resnet50(num_classes=5)
    parameters = dict(network.named_parameters())
    affine = network.layer1[0].bn2.weight
    with torch.no_grad():
        affine.uniform_()
    with caplog.at_level(logging.INFO, "rethinking_bn"):
        assert convert_norms(network, "MABN", batch_size=2) is network
    assert "53 of 53 MABN layers start with new statistics" in caplog.text
    assert {name for name, _ in network.named_parameters()} == set(parameters)
    assert all(p is parameters[n] for n, p in network.named_parameters() if p.dim() == 4)
    assert torch.equal(network.layer1[0].bn2.weight, affine)
    assert sum(isinstance(m, CenConv2d) for m in network.modules()) == 53
    assert all(m.batch_size == 2 for m in network.modules() if isinstance(m, MABN2d))
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    assert network.bn1.iterations == 1
    # and from MABN to MABN its statistics are carried over
    before = network.layer1[0].bn1.running_mean_square.clone()
    caplog.clear()
    convert_norms(network, "MABN", batch_size=4)
    assert torch.equal(network.layer1[0].bn1.running_mean_square, before)
    assert "new statistics" not in caplog.text
    assert isinstance(convert_norms(network, "BN").conv1, CenConv2d)


@pytest.mark.parametrize("norm", [name for name in norm_names() if name])
def test_every_name_runs_in_a_torchvision_network(norm: str) -> None:
    network = convert_norms(resnet18(num_classes=3), norm)
    kind = type(get_norm(norm, 64))
    assert sum(type(m) is kind for m in network.modules()) == 20
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    assert network.conv1.weight.grad is not None


def test_a_shared_layer_stays_shared_under_all_its_names() -> None:
    model = nn.Module()
    model.first = model.second = nn.BatchNorm2d(4)
    model.nested = nn.Sequential(model.first)
    model.loop = [model.first]
    convert_norms(model, "SyncBN")
    assert isinstance(model.first, SyncBatchNorm2d)
    assert model.first is model.second is model.nested[0] is model.loop[0]


class Frozen(nn.Module):
    """One of each kind that freezing must reach."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = trained(BatchNorm2d(4))
        self.levels = trained(MultiDomainBatchNorm2d(4, 2))
        self.conv = CenConv2d(4, 4, 1, bias=False)
        self.average = trained(MABN2d(4, batch_size=2))
        self.groups = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.groups(self.average(self.conv(self.plain(x))))
        return self.levels([x, x[:, :, ::2]])


# defect 25: convert_frozen_batchnorm skips our layers or changes them without a word
def test_frozen_bn_freezes_every_layer_of_ours() -> None:
    model = Frozen()
    convert_norms(model, "FrozenBN").train()
    assert type(model.plain) is FrozenBatchNorm2d
    assert all(is_frozen(layer) for layer in (model.levels, model.average))
    assert not any(p.requires_grad for p in [*model.levels.parameters(), model.average.weight])
    assert type(model.groups) is nn.GroupNorm
    before = {key: value.clone() for key, value in model.named_buffers()}
    model(torch.randn(2, 4, 5, 5))
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())
    assert not any(p.requires_grad for p in [*model.levels.parameters(), model.average.weight])


def test_a_frozen_layer_stays_frozen() -> None:
    old = BatchNorm2d(4)
    freeze_layer(old)
    new = convert_norms(old, "SyncBN").train()
    assert isinstance(new, SyncBatchNorm2d) and is_frozen(new) and not new.training


def test_sync_bn_reaches_layers_with_domains_and_leaves_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.ModuleList([MultiDomainBatchNorm2d(4, 2), CycleBatchNorm2d(4, 2)])
    model.extend([nn.GroupNorm(2, 4), nn.BatchNorm1d(4), nn.LazyBatchNorm2d()])
    levels = model[0]
    with caplog.at_level(logging.INFO, "rethinking_bn"):
        convert_norms(model, "SyncBN")
        assert model[0] is levels and model[0].sync and model[1].sync
        assert type(model[2]) is nn.GroupNorm and caplog.messages[0].endswith(": 3, 4 stay")
        convert_norms(model, "BN")
        assert not model[0].sync and type(model[2]) is BatchNorm2d
        convert_norms(model, "IN")
        assert model[0] is levels and ": 0, 1, 3, 4 stay" in caplog.messages[-1]


class Logged(nn.BatchNorm2d):
    """A forward of its own that computes what BatchNorm computes."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class GroupNormAct(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class NoEpsAttribute(nn.Module):
    """The original DETR's FrozenBatchNorm2d, under another name."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-3).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class InPlaceActivated(NoEpsAttribute):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu_(super().forward(x))


class Inlined(nn.BatchNorm2d):
    """It does not call its parent's forward, as timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        own: Any = (self.running_mean, self.running_var, self.weight, self.bias, self.training)
        batch_norm: Any = nn.functional.batch_norm
        return batch_norm(x, *own, self.momentum, self.eps).relu()


class Ghost(nn.BatchNorm2d):
    """Two samples at a time: no other norm of the whole batch computes that."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(Ghost, self).forward(part) for part in x.split(2)])


# defect 41: the activation of timm's norms was dropped without a word
@pytest.mark.parametrize("kind", [NormAct, Inlined])
@pytest.mark.parametrize("norm", ["BN", "SyncBN", "BatchStatBN", "FrozenBN"])
def test_what_a_subclass_does_besides_is_kept(norm: str, kind: Any) -> None:
    model = nn.Sequential(trained(kind(4)))
    model[0].note = "kept"
    keys, twin = list(model.state_dict()), copy.deepcopy(model)
    convert_norms(model, norm)
    assert isinstance(model[0], kind) and model[0].note == "kept"
    assert list(model.state_dict()) == keys
    x = torch.randn(2, 4, 3, 3)
    if norm == "FrozenBN":
        assert is_frozen(model[0]) and not model[0].weight.requires_grad
    else:
        assert isinstance(model[0], BATCH_NORMS[norm])
        assert (model(x) >= 0).all() and model(x[:0]).shape == x[:0].shape  # an empty batch: ours
        torch.testing.assert_close(model(x), twin(x))
    if norm != "BatchStatBN":
        twin.load_state_dict(model.state_dict())
        torch.testing.assert_close(model.eval()(x), twin.eval()(x))
    copied = pickle.loads(pickle.dumps(model)) if norm != "FrozenBN" else copy.deepcopy(model)
    torch.testing.assert_close(copied(x), model(x))


def test_a_subclass_that_is_of_the_kind_stays_and_is_named(caplog: Any) -> None:
    model = nn.ModuleList([Ghost(4)])
    kept = model[0]
    convert_norms(model, "BN")
    assert model[0] is kept and "0 (Ghost: a forward of its own)" in caplog.text


@pytest.mark.parametrize("norm", ["SyncBN", "GN"])
@pytest.mark.parametrize("make", [Ghost, lambda channels: GroupNormAct(2, channels)])
def test_a_layer_that_does_more_is_refused_by_name(make: Any, norm: str) -> None:
    model = nn.ModuleDict({"fine": nn.BatchNorm2d(4), "more": make(4)})
    kept, options = dict(model.named_children()), {"num_groups": 2} if norm == "GN" else {}
    if isinstance(model["more"], nn.GroupNorm) and norm == "SyncBN":
        assert convert_norms(model, norm)["more"] is kept["more"]
        return
    with pytest.raises(ValueError, match=r"^more: (Ghost|GroupNormAct) .*replace="):
        convert_norms(model, norm, **options)
    assert dict(model.named_children()) == kept
    if isinstance(model["more"], Ghost):
        assert is_frozen(convert_norms(model, "FrozenBN")["more"])


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN"])
def test_replace_says_what_becomes_of_it(norm: str) -> None:
    model = nn.Sequential(trained(nn.BatchNorm2d(4)), trained(NormAct(4)), InPlaceActivated(4))
    x = torch.randn(2, 4, 3, 3)
    before = model.eval()(x)

    def with_relu(layer: NormAct, new: nn.Module) -> nn.Module:
        assert type(layer) is NormAct and type(new) is BATCH_NORMS[norm]
        return nn.Sequential(new, nn.ReLU())

    def with_leaky(layer: InPlaceActivated, new: Any) -> nn.Module:
        new.eps = 1e-3
        return nn.Sequential(new, nn.LeakyReLU())

    convert_norms(model, norm, replace={NormAct: with_relu, InPlaceActivated: with_leaky})
    assert type(model[1][0]) is type(model[2][0]) is BATCH_NORMS[norm]
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("make", [Logged, NoEpsAttribute])
@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN"])
def test_what_proves_to_be_batch_norm_is_converted(make: Any, norm: str) -> None:
    model = nn.Sequential(trained(make(4)))
    x = torch.randn(2, 4, 3, 3)
    before = model.eval()(x)
    convert_norms(model, norm)
    assert type(model[0]) is BATCH_NORMS[norm]
    torch.testing.assert_close(model(x), before)


def test_statistics_without_tracking_are_carried_over() -> None:
    old: Any = trained(nn.BatchNorm2d(4))
    old.track_running_stats = False
    new: Any = convert_norms(old, "BN")
    assert torch.equal(new.running_mean, old.running_mean) and not new.track_running_stats
    before = new.running_mean.clone()
    new(torch.randn(2, 4, 3, 3))
    assert torch.equal(new.running_mean, before)


def test_instance_norm_with_statistics_is_frozen_or_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True))
    convert_norms(model, "SyncBN")
    assert type(model[0]) is nn.InstanceNorm2d and " 0 stay" in caplog.text
    assert is_frozen(convert_norms(model, "FrozenBN")[0])


def test_what_stays_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm3d(4), InPlaceActivated(4))
    convert_norms(model, "SyncBN")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert all(word in record.getMessage() for word in (" 0,", " 1,", "2 (InPlaceActivated"))


def refused() -> dict[str, tuple[nn.Module, str, dict[str, Any], str]]:
    bn, without = nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)
    return {
        "name": (bn, "bn", {}, "norm must be one of .*'SyncBN'.* got 'bn'"),
        "name, nothing to do": (nn.ReLU(), "bn", {}, "norm must be one of"),
        "groups": (bn, "GN", {}, "x: GN has 32 groups, .* not divide 4 channels"),
        "no groups": (bn, "GN", {"num_groups": 0}, "fine.1: GN has 0 groups"),
        "unfit batch": (bn, "MABN", {"batch_size": 3}, "fine.1: the simulated batch"),
        "statistics": (without, "FrozenBN", {}, "x: BatchNorm2d has no statistics"),
        "parametrized": (parametrized(), "BN", {}, "x: tensors of this .* parametrized"),
        "convolution": (bn, "MABN", {}, "x: MABN needs a plain convolution"),
    }


@pytest.mark.parametrize("case", refused())
def test_what_is_refused_leaves_the_model_as_it_was(case: str) -> None:
    broken, norm, options, message = refused()[case]
    model = nn.ModuleDict({"fine": nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32))})
    model.add_module("x", broken)
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        convert_norms(model, norm, **options)
    assert list(model.modules()) == before


def test_instance_norm_bears_what_heads_feed_it() -> None:
    layer = get_norm("IN", 4)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(layer.double()(x), (x - mean) / (var + 1e-5).sqrt())
    assert layer(x[:0]).shape == (0, 4, 5, 5)
    torch.testing.assert_close(layer(x[:1, :, :1, :1]), x.new_zeros(1, 4, 1, 1))
    assert isinstance(layer, nn.InstanceNorm2d) and len(list(layer.parameters())) == 2
    torch.testing.assert_close(layer(x[0]), layer(x)[0])  # an image without its batch
    with pytest.raises(ValueError, match="4D"):
        layer(x[0, 0])
    with pytest.raises(ValueError, match="track_running_stats"):
        get_norm("IN", 4, track_running_stats=True)
