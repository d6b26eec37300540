"""Frozen statistics stay through everything that moves a layer out of eval mode (defect 21)."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rethinking_bn import layers as ours
from rethinking_bn.population import (
    estimate_population_statistics,
    freeze_batch_norm,
    unfreeze_batch_norm,
)

C = 3


class Activated(nn.BatchNorm2d):
    """Somebody's subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        y = F.batch_norm(input, mean, var, self.weight, self.bias, self.training, 0.1, self.eps)
        return y.relu()


LAYERS: dict[str, Any] = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(C),
    "BatchNorm2d": lambda: nn.BatchNorm2d(C),
    "BatchNorm3d": lambda: nn.BatchNorm3d(C),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(C),
    "subclass": lambda: Activated(C),
    "ours": lambda: ours.BatchNorm2d(C),
    "ours, sync": lambda: ours.SyncBatchNorm2d(C),
    "ours, batch statistics": lambda: ours.BatchStatNorm2d(C),
    "shared": lambda: ours.MultiDomainBatchNorm2d(C, 2),
    "domain_specific": lambda: ours.MultiDomainBatchNorm2d(
        C, 2, population_stats="domain_specific", affine="domain_specific"
    ),
    "cycle": lambda: ours.CycleBatchNorm2d(C, 2),
    "MABN": lambda: ours.MABN2d(C, batch_size=32),
}


class Net(nn.Module):
    """One normalisation layer, called as it wants to be."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        with torch.no_grad():
            for tensor in norm.state_dict().values():
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Any:
        if isinstance(self.norm, ours.MultiDomainBatchNorm2d):
            return self.norm([x, x[:, :, :2]])
        if isinstance(self.norm, ours.CycleBatchNorm2d):
            with self.norm.cycle():
                return [self.norm(x), self.norm(x[:, :, :2])]
        return self.norm(x)


def _input(norm: nn.Module) -> Tensor:
    dims = {nn.BatchNorm1d: 1, nn.BatchNorm3d: 3}.get(type(norm), 2)
    return torch.randn(4, C, *[4] * dims) + 1


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "itself": lambda m: m,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save": _saved,
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("kind", LAYERS)
def test_population_statistics_from_now_on(kind: str, copied: str) -> None:  # defect 21
    model = Net(LAYERS[kind]())
    x, keys, cls = _input(model.norm), list(model.state_dict()), type(model.norm)
    expected = model.eval()(x)
    state = _state(model)
    model.train()
    assert freeze_batch_norm(model) == ["norm"]
    model = COPIES[copied](model)
    for mode in (True, False, True):  # detectron2's evaluation: eval(), then train(True)
        model.train(mode)
        torch.testing.assert_close(model(x), expected)
    for module in model.modules():
        module.training = True  # without train()
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(_state(model), state)
    assert isinstance(model.norm, cls) and list(model.state_dict()) == keys
    assert type(model.norm).forward is cls.forward

    assert unfreeze_batch_norm(model) == ["norm"] and type(model.norm) is cls
    assert model.norm.training
    model(x)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(_state(model), state)


@pytest.mark.parametrize("kind", ["BatchNorm2d", "subclass", "SyncBatchNorm"])
def test_scripted_and_traced(kind: str) -> None:
    model = Net(LAYERS[kind]()).eval()
    x = _input(model.norm)
    freeze_batch_norm(model.train())
    expected = model(x)
    traced = torch.jit.trace(model, x)
    scripted = torch.jit.script(model.norm) if kind != "SyncBatchNorm" else traced
    for module in (traced, scripted):
        torch.testing.assert_close(module.train()(x), expected)
        file = io.BytesIO()
        torch.jit.save(module, file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file).train()(x), expected)


def test_gradients_are_those_of_eval_mode_and_the_optimizer_sees_the_affine() -> None:
    results = []
    for frozen in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, C, 3), nn.BatchNorm2d(C), ours.BatchNorm2d(C))
        if frozen:
            freeze_batch_norm(model)
        model.train(frozen)
        model(torch.randn(2, 2, 5, 5)).square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", ["BatchNorm2d", "domain_specific", "MABN"])
def test_affine(kind: str) -> None:
    model = Net(LAYERS[kind]())
    first, *others = model.norm.parameters()
    first.requires_grad_(False)
    freeze_batch_norm(model)
    assert [p.requires_grad for p in others] == [True] * len(others)
    freeze_batch_norm(model, affine=True)
    freeze_batch_norm(model, affine=True)
    assert not any(p.requires_grad for p in model.parameters())
    model = copy.deepcopy(model)
    unfreeze_batch_norm(model)
    first, *others = model.norm.parameters()
    assert not first.requires_grad and all(p.requires_grad for p in others)


def test_a_layer_of_ours_freezes_itself() -> None:
    layer = ours.BatchNorm2d(C).eval()
    assert layer.freeze(affine=True) is layer and not layer.weight.requires_grad
    assert not layer.train().training and "BatchNorm2d" in repr(layer)
    assert layer.unfreeze() is layer and layer.training and layer.weight.requires_grad


def test_population_training_leaves_frozen_layers_alone_and_names_them() -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), nn.Sequential(ours.BatchNorm2d(C)), nn.BatchNorm2d(C))
    freeze_batch_norm(model[:2])
    before = _state(model[:2])
    batches = [torch.randn(4, C, 2, 2) + 3] * 2
    for labelled in (True, False):
        report = estimate_population_statistics(model, batches, 2, labelled=labelled)
        assert report.frozen == ("0", "1.0") and [r.name for r in report.layers] == ["2"]
    torch.testing.assert_close(_state(model[:2]), before)
    unfreeze_batch_norm(model)
    assert all(module.training for module in model.modules())


def test_a_new_model_that_loads_the_state_dict_is_not_frozen() -> None:
    model, other = Net(nn.BatchNorm2d(C)), Net(nn.BatchNorm2d(C))
    freeze_batch_norm(model)
    assert other.load_state_dict(model.state_dict()) and other.norm.training
    model.load_state_dict(other.state_dict())
    assert not model.train().norm.training


def test_what_cannot_be_frozen_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="1: a lazy layer"):
        freeze_batch_norm(model)
    assert type(model[0]) is nn.BatchNorm2d
    cycle = ours.CycleBatchNorm2d(C, 2)
    cycle(torch.randn(1, C, 2, 2))
    model = nn.Sequential(nn.BatchNorm2d(C), cycle)
    with pytest.raises(RuntimeError, match=r"freeze\(\) after 1 of 2 calls"):
        freeze_batch_norm(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert freeze_batch_norm(nn.GroupNorm(1, C)) == [] and "no BN-like layer" in caplog.text


def test_detectron2_s_layers() -> None:
    from detectron2.evaluation import inference_context
    from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm

    model = nn.Sequential(NaiveSyncBatchNorm(C), FrozenBatchNorm2d(C))
    assert freeze_batch_norm(model) == ["0"]
    state = _state(model)
    with inference_context(model):
        assert not model.training
    assert model.training and not model[0].training
    model(torch.randn(2, C, 2, 2) + 5)
    torch.testing.assert_close(_state(model), state)
    assert isinstance(model[0], NaiveSyncBatchNorm)


@pytest.mark.parametrize("kind", LAYERS)
def test_reset_parameters(kind: str) -> None:
    layer = LAYERS[kind]()
    new = _state(layer)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.fill_(7)
    layer.reset_parameters()
    torch.testing.assert_close(_state(layer), new)
