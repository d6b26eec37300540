"""Which layers are like BatchNorm: every kind by an example, under names that tell nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from rethinking_bn.layers import (
    BatchNorm2d,
    BatchStatNorm2d,
    CycleBatchNorm2d,
    MABN2d,
    MultiDomainBatchNorm2d,
    SyncBatchNorm2d,
)
from rethinking_bn.layers.bn_like import find_bn_like


class Buffers(nn.Module):
    """Statistics and affine of a foreign norm, none of it the identity."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 0.7))
        self.bias = nn.Parameter(torch.full((channels,), -0.2))
        self.register_buffer("running_mean", torch.full((channels,), 0.3))
        self.register_buffer("running_var", torch.full((channels,), 2.0))
        self.momentum = 0.1


class Functional(Buffers):
    def forward(self, x: Any, by_batch: bool | None = None, weight: Any = None) -> Any:
        by_batch = self.training if by_batch is None else by_batch
        weight = self.weight if weight is None else weight
        own = (self.running_mean, self.running_var, weight, self.bias)
        return F.batch_norm(x, *own, by_batch, self.momentum, 1e-3)


class Constant(Functional):
    def forward(self, x: Any) -> Any:
        return super().forward(x, False)


class MapsOnly(Buffers):
    def forward(self, x: Any) -> Any:
        scale = self.weight * (self.running_var + 2e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class WithoutEps(Buffers):
    def forward(self, x: Any) -> Any:
        scale = self.weight * self.running_var.rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class Sequences(Functional):
    def forward(self, x: Any) -> Any:
        assert x.dim() == 3
        return super().forward(x, False)


class InPlaceActivated(Functional):
    def forward(self, x: Any) -> Any:
        return F.leaky_relu_(super().forward(x))


class EpsOutside(Buffers):
    def forward(self, x: Any) -> Any:
        scale = (self.weight / (self.running_var.sqrt() + 1e-5))[:, None, None]
        return (x - self.running_mean[:, None, None]) * scale + self.bias[:, None, None]


class LargestOfEps(Functional):
    def forward(self, x: Any) -> Any:
        var = self.running_var.clamp(min=1e-5)
        return F.batch_norm(x, self.running_mean, var, self.weight, self.bias, False, 0.0, 0.0)


class AbsoluteWeight(Functional):
    def forward(self, x: Any) -> Any:
        return super().forward(x, weight=self.weight.abs())


class OtherMomentum(Functional):
    def forward(self, x: Any) -> Any:
        own = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(x, *own, self.training, 1 - self.momentum, 1e-3)


class Streaming(Functional):
    def forward(self, x: Any) -> Any:
        out = super().forward(x, False)
        if self.training:
            self.running_mean.lerp_(x.mean((0, 2, 3)), self.momentum)
        return out


class Fails(Functional):
    def forward(self, x: Any) -> Any:
        raise RuntimeError("CUDA only")


class Uncopied(Constant):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no copies")


class NormAct(nn.BatchNorm2d):
    def forward(self, x: Any) -> Any:
        return super().forward(x).relu()


class Masked(nn.BatchNorm1d):
    def forward(self, x: Any, mask: Any) -> Any:
        return super().forward(x) * mask


class ConstantSubclass(nn.BatchNorm2d):
    def forward(self, x: Any) -> Any:
        own = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(x, *own, False, 0.0, self.eps)


class OursAndMore(BatchNorm2d):
    def forward(self, x: Any) -> Any:
        return super().forward(x).relu()


class OnlyRenamed(nn.BatchNorm2d):
    pass


def switched_off() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.track_running_stats = False
    return layer


def parametrized() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


def with_forward_of_its_own() -> nn.Module:
    layer: Any = nn.BatchNorm2d(4)
    layer.forward = lambda x: x
    return layer


def frozen(layer: Any) -> nn.Module:
    return layer.freeze()


ONE = ("",)
KINDS: dict[str, tuple[Any, str, str, tuple[str, ...], float]] = {
    "torch": (nn.BatchNorm2d(4, eps=1e-3), "torch", "", ONE, 1e-3),
    "1d": (nn.BatchNorm1d(4), "torch", "", ONE, 1e-5),
    "eval": (nn.BatchNorm2d(4).eval(), "torch", "eval mode", ONE, 1e-5),
    "sync": (nn.SyncBatchNorm(4), "torch", "", ONE, 1e-5),
    "half buffers": (nn.BatchNorm2d(4).half(), "torch", "", ONE, 1e-5),
    "no affine": (nn.BatchNorm2d(4, affine=False), "torch", "", ONE, 1e-5),
    "no statistics": (nn.BatchNorm2d(4, track_running_stats=False), "torch", "", (), 1e-5),
    "switched off": (switched_off(), "torch", "", ONE, 1e-5),
    "renamed": (OnlyRenamed(4), "torch", "", ONE, 1e-5),
    "parametrized": (parametrized(), "torch", "", ONE, 1e-5),
    "instance": (nn.InstanceNorm2d(4, track_running_stats=True), "own", "", ONE, 1e-5),
    "activated": (NormAct(4), "own", "", ONE, 1e-5),
    "masked": (Masked(4), "own", "", ONE, 1e-5),
    "assigned": (with_forward_of_its_own(), "own", "", ONE, 1e-5),
    "ours activated": (OursAndMore(4), "own", "", ONE, 1e-5),
    "functional": (Functional(), "own", "", ONE, 1e-3),
    "constant": (Constant(), "constant", "constant", ONE, 1e-3),
    "one channel": (Constant(1), "constant", "constant", ONE, 1e-3),
    "maps only": (MapsOnly(), "constant", "constant", ONE, 2e-5),
    "no eps": (WithoutEps(), "constant", "constant", ONE, 0.0),
    "sequences": (Sequences(), "constant", "constant", ONE, 1e-3),
    "constant subclass": (ConstantSubclass(4), "constant", "constant", ONE, 1e-5),
    "meta": (Constant().to("meta"), "constant", "constant", ONE, 1e-3),
    "torchvision": (
        torchvision.ops.FrozenBatchNorm2d(4, eps=1e-4),
        *("constant", "constant", ONE, 1e-4),
    ),
    "ours": (BatchNorm2d(4), "ours", "", ONE, 1e-5),
    "ours frozen": (frozen(SyncBatchNorm2d(4)), "ours", "freeze_batch_norm", ONE, 1e-5),
    "ours without": (BatchNorm2d(4, track_running_stats=False), "ours", "", (), 1e-5),
    "by batch": (BatchStatNorm2d(4), "ours", "", ONE, 1e-5),
    "cycle": (CycleBatchNorm2d(4, 3), "ours", "", ("0", "1", "2"), 1e-5),
    "levels": (MultiDomainBatchNorm2d(4, 3), "ours", "", ONE, 1e-5),
    "mabn": (MABN2d(4), "ours", "", ONE, 1e-5),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_a_layer_is(name: str) -> None:
    module, kind, by, domains, eps = KINDS[name]
    layers, left = find_bn_like(nn.ModuleList([nn.Conv2d(1, 1, 1), module, nn.ReLU()]))
    assert not left
    (layer,) = layers
    assert (layer.name, layer.module) == ("1", module)
    assert (layer.kind, layer.frozen, layer.domains) == (kind, by, domains)
    assert layer.eps == pytest.approx(eps, rel=1e-5)
    assert layer.pools_ranks == (name in ("sync", "ours frozen"))
    assert layer.by_batch == (name in ("no statistics", "ours without", "by batch"))
    assert layer.mean_square == (name == "mabn")


@pytest.mark.parametrize(
    "module, reason",
    [
        (InPlaceActivated(), "formula"),
        (EpsOutside(), "formula"),
        (LargestOfEps(), "formula"),
        (AbsoluteWeight(), "formula"),
        (OtherMomentum(), "momentum"),
        (Streaming(), "moves"),
        (Fails(), "CUDA only"),
        (Uncopied(), "no copies"),
    ],
)
def test_what_is_not_known_is_named_with_the_reason(module: nn.Module, reason: str) -> None:
    layers, left = find_bn_like(nn.Sequential(module))
    assert not layers
    assert (left[0].name, left[0].module) == ("0", module)
    assert reason in left[0].reason
    assert type(module).__name__ in str(left[0])


def test_scripted_layers_are_named() -> None:
    layers, left = find_bn_like(nn.Sequential(torch.jit.script(nn.BatchNorm2d(3))))
    assert not layers and [part.name for part in left] == ["0"]
    assert "scripted" in left[0].reason


def test_other_norms_and_norms_without_any_tensor_are_none() -> None:
    without = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), without)
    assert find_bn_like(model) == ([], [])


def test_a_layer_under_two_names_is_found_once_and_parts_of_a_layer_are_not() -> None:
    shared = nn.BatchNorm2d(4)
    levels = MultiDomainBatchNorm2d(4, 2, population_stats="domain_specific")
    layers, _ = find_bn_like(nn.ModuleList([shared, shared, levels]))
    assert [layer.name for layer in layers] == ["0", "2"]


def test_looking_changes_nothing_and_runs_no_hook() -> None:
    module = Constant()
    module.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    model = nn.Sequential(module.eval(), nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = dict(vars(module))
    state = torch.get_rng_state()
    find_bn_like(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(module) == attributes and not module.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_lazy_layer_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="0.*lazy"):
        find_bn_like(nn.Sequential(nn.LazyBatchNorm2d()))


@pytest.mark.parametrize("name", ["torch", "functional", "constant", "cycle", "levels", "mabn"])
def test_statistics_are_written_as_they_are_read(name: str) -> None:
    module = KINDS[name][0]
    (layer,), _ = find_bn_like(module)
    mean, var = layer.read()
    assert mean.dtype == torch.float64 and mean.shape == (len(layer.domains), 4)
    new_mean = torch.zeros_like(mean) if layer.mean_square else mean + 0.5
    layer.write_statistics(new_mean, var + 0.25)
    (got_mean, got_var), (layer_again,) = layer.read(), find_bn_like(module).layers
    assert torch.equal(got_mean, new_mean) and torch.equal(got_var, var + 0.25)
    layer_again.write_statistics(mean, var)
