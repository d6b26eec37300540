"""AveragedWeights against the formulas written out in float64, tensor by tensor."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rethinking_bn.averaging import AveragedWeights
from rethinking_bn.layers import BatchNorm2d, CenConv2d, MABN2d, MultiDomainBatchNorm2d
from rethinking_bn.population import (
    estimate_population_statistics,
    freeze_batch_norm,
    unfreeze_batch_norm,
)

equal = partial(torch.testing.assert_close, rtol=0, atol=0)


class Net(nn.Module):
    """A convolution, a norm over two levels and a classifier."""

    def __init__(self, population: str = "domain_specific") -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1, bias=False)
        self.norm = MultiDomainBatchNorm2d(
            3, 2, train_stats="shared", population_stats=population, affine="shared"
        )
        self.bn = BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        levels = self.norm([self.conv(x), self.conv(x[..., ::2, ::2])])
        return sum(self.bn(level.relu()).mean() for level in levels)


def drift(model: nn.Module, seed: int) -> None:
    """Move every parameter, and every running statistic, as a training step might."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor += torch.rand(tensor.shape, generator=generator).to(tensor)


def reference(
    history: list[dict[str, Tensor]], kind: str, decay: float, warmup: bool
) -> dict[str, Tensor]:
    """Return the average of the states; the first is that before any update."""
    if kind == "swa":
        count = len(history) - 1
        return {k: sum(s[k].double() for s in history[1:]) / count for k in history[0]}
    average = {k: v.double() for k, v in history[0].items()}
    for n, state in enumerate(history[1:]):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        average = {k: d * average[k] + (1 - d) * state[k].double() for k in average}
    return average


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}


@pytest.mark.parametrize("statistics", ["estimate", "average", "copy"])
@pytest.mark.parametrize(
    ("kind", "warmup", "decay"), [("ema", True, 0.5), ("ema", False, 0.9), ("swa", True, 0.9)]
)
def test_equals_the_formula(kind: Any, warmup: bool, decay: float, statistics: Any) -> None:
    model = Net()
    averaged = AveragedWeights(model, kind, decay=decay, warmup=warmup, statistics=statistics)
    history = [snapshot(model)]
    for step in range(12):  # the warm-up of 0.5 ends at n = 8
        drift(model, step)
        averaged.update(model)
        history.append(snapshot(model))
    live = snapshot(model)
    expected = reference(history, kind, decay, warmup)
    target = Net()
    averaged.copy_to(target)
    parameters = dict(model.named_parameters())
    assert averaged.updates == 12
    for name, value in snapshot(target).items():
        if name in parameters or statistics == "average":
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(value, live[name]), name
    equal(snapshot(model), live)


def test_estimate_is_population_training_of_the_average(caplog: Any) -> None:
    model = Net()
    averaged = AveragedWeights(model, "swa", statistics="estimate")
    for step in range(3):
        drift(model, step)
        averaged.update(model)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(dict(averaged.module.named_parameters())[name])
    batches = [torch.randn(4, 2, 8, 8) for _ in range(3)]
    estimate_population_statistics(expected, batches, 3)
    target = Net()
    with caplog.at_level(logging.WARNING):
        averaged.copy_to(target)
    assert "no estimate" in caplog.text and not averaged.estimated
    assert torch.equal(target.bn.running_mean, model.bn.running_mean)  # the last model's
    caplog.clear()
    report = averaged.estimate_statistics(iter(batches), 3)
    assert report.num_batches == 3 and averaged.estimated
    averaged.copy_to(target)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    equal(snapshot(target), snapshot(expected))
    averaged.update(model)
    assert not averaged.estimated


def test_estimate_keeps_frozen_layers_and_modes() -> None:
    model = Net()
    model.bn.eval()
    averaged = AveragedWeights(model, statistics="estimate")
    averaged.update(model)
    report = averaged.estimate_statistics([torch.randn(4, 2, 8, 8)], 1)
    assert report.frozen == ("bn",) and torch.equal(averaged.module.bn.running_mean, torch.zeros(3))
    model.eval()  # all of it: a model at inference, not one whose layers are frozen
    averaged.update(model)
    assert not averaged.estimate_statistics([torch.randn(4, 2, 8, 8)], 1).frozen
    assert not averaged.module.training and not averaged.module.bn.training


def test_layers_frozen_on_the_way_keep_the_statistics_of_the_model() -> None:
    model = nn.Sequential(Net().conv, BatchNorm2d(3), nn.BatchNorm2d(3))
    averaged = AveragedWeights(model, "swa", statistics="estimate")
    averaged.update(model)
    freeze_batch_norm(model, affine=True)
    drift(model, 0)
    averaged.update(model)
    averaged.module.train()
    assert not averaged.module[1].training and not averaged.module[2].training
    for layer in (1, 2):
        assert torch.equal(averaged.module[layer].running_mean, model[layer].running_mean)
    averaged.restart(model)  # the average of a frozen model
    unfreeze_batch_norm(model)
    averaged.update(model)
    report = averaged.estimate_statistics([torch.randn(4, 2, 8, 8)], 1)
    assert not report.frozen and averaged.module[2].training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in averaged.module.parameters())


def test_estimate_needs_statistics_that_are_not_averaged() -> None:
    averaged = AveragedWeights(Net(), statistics="average")
    with pytest.raises(ValueError, match='statistics="estimate"'):
        averaged.estimate_statistics([torch.randn(4, 2, 8, 8)], 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_averaged_in_float32(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).to(dtype)
    averaged = AveragedWeights(model, decay=0.999, warmup=False, statistics="average")
    history = [snapshot(model)]
    for step in range(50):  # a step of 1/1000 of a difference is below the half types' rounding
        with torch.no_grad():
            for tensor in [*model.parameters(), model[1].running_mean]:
                tensor.fill_(1 + step / 64)
        averaged.update(model)
        history.append(snapshot(model))
    expected = reference(history, "ema", 0.999, False)
    restored = AveragedWeights(model, decay=0.999, warmup=False, statistics="average")
    restored.load_state_dict(averaged.state_dict())
    for one in (averaged, restored):
        found = snapshot(one.module)
        assert {value.dtype for value in found.values()} == {dtype}
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name].to(dtype))
    wide = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    averaged.copy_to(wide)
    torch.testing.assert_close(wide[0].weight.double(), expected["0.weight"], rtol=1e-5, atol=1e-6)
    drift(model, 0)
    averaged.update(model)
    restored.update(model)
    kept = averaged.state_dict()["float32"]
    assert {value.dtype for value in kept.values()} == {torch.float32}
    equal(restored.state_dict()["float32"], kept)


def moved(change: Any) -> Any:
    return lambda averaged: (averaged, change(averaged.module))[0]


def assign(module: nn.Module) -> None:
    state = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


# defect 37: the copy counted its updates and stood still
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("statistics", ["average", "copy"])
@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda averaged: pickle.loads(pickle.dumps(averaged)),
        lambda averaged: copy.deepcopy([averaged])[0],  # as part of a trainer
        moved(assign),
        moved(lambda module: module.to(memory_format=torch.channels_last)),
        moved(lambda module: module.double().float() if module[1].weight.dtype.itemsize > 2 else 0),
        moved(lambda module: module.double()),
        moved(lambda module: module.requires_grad_(True).share_memory()),
    ],
)
def test_what_is_done_to_the_average_is_followed(change: Any, statistics: Any, dtype: Any) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)).to(dtype)
    averaged = AveragedWeights(model, decay=0.9, warmup=False, statistics=statistics)
    history = [snapshot(model)]
    for step in range(6):
        drift(model, step)
        if step == 3:
            averaged = change(averaged)
        averaged.update(model)
        history.append(snapshot(model))
    expected = reference(history, "ema", 0.9, False)
    for name, value in snapshot(averaged.module).items():
        copied = statistics == "copy" and "running" in name
        right = history[-1][name].double() if copied else expected[name]
        tolerance = 1e-6 if value.dtype != torch.bfloat16 else 1e-2
        torch.testing.assert_close(value.double(), right, rtol=tolerance, atol=tolerance)


def test_weights_that_somebody_loads_into_the_average_are_averaged_on() -> None:
    model = nn.Linear(2, 2).bfloat16()
    averaged = AveragedWeights(model, decay=0.5, warmup=False)
    averaged.update(model)
    averaged.module.load_state_dict(
        {n: torch.full_like(v, 4.0) for n, v in model.state_dict().items()}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)
    averaged.update(model)
    assert all((p == 3).all() for p in averaged.module.parameters())


def test_a_formula_of_ones_own_and_a_device() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    formula: Any = lambda old, new, n: torch.maximum(old, new) + n  # noqa: E731
    averaged = AveragedWeights(model, avg_fn=formula, device="cpu")
    expected = model[0].weight.detach().clone()
    for step in range(3):
        drift(model, step)
        averaged.update(model)
        expected = formula(expected, model[0].weight.detach(), step)
    torch.testing.assert_close(averaged.module[0].weight.detach(), expected)


def test_a_model_that_cannot_be_copied_names_the_module() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    model[1][0].cache = model[0](torch.ones(1, 2))  # part of a graph
    with pytest.raises(ValueError, match=r"1\.0 \(Linear\) cannot be copied"):
        AveragedWeights(model)


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    averaged, values = AveragedWeights(model, "swa"), []
    for step in range(3):
        drift(model, step)
        values.append(model[0].weight.detach().clone())
        averaged.update(model)
    assert averaged.module[0].weight is averaged.module[1].weight
    torch.testing.assert_close(averaged.module[0].weight.detach(), sum(values) / 3)
    averaged.copy_to(model)
    assert model[0].weight is model[1].weight


def test_parameters_added_or_resized_later_are_an_error() -> None:
    model = Net()
    averaged = AveragedWeights(model)
    averaged.update(model)
    before = snapshot(averaged.module)
    drift(model, 0)
    model.extra = nn.Linear(2, 2)
    for call in (averaged.update, averaged.copy_to):
        with pytest.raises(ValueError, match=r"added extra\.weight, extra\.bias;"):
            call(model)
    del model.extra
    model.conv = nn.Conv2d(2, 3, 3, bias=False)
    with pytest.raises(ValueError, match=r"resized conv\.weight \(3, 2, 3, 3\)"):
        averaged.update(model)
    model.conv = nn.Identity()
    with pytest.raises(ValueError, match=r"missing conv\.weight"):
        averaged.update(model)
    assert averaged.updates == 1
    equal(snapshot(averaged.module), before)
    averaged.restart(model)
    averaged.update(model)
    # modules without parameters count, too
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    averaged = AveragedWeights(model)
    for other in (nn.Sequential(model[0], nn.Tanh()), nn.Sequential(*model, nn.Tanh())):
        with pytest.raises(ValueError, match="modules"):
            averaged.update(other)


@pytest.mark.parametrize("statistics", ["estimate", "average", "copy"])
def test_mabn(statistics: Any) -> None:
    """Its ring buffers appear with the first forward, and their counts are no tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(
        CenConv2d(2, 3, 1, norm=MABN2d(3, simulated_batch_size=4, warmup_iters=0))
    )
    layer = model[0].norm
    averaged = AveragedWeights(model, decay=0.5, warmup=False, statistics=statistics)
    running = layer.running_mean_square.clone().double()
    for _ in range(5):
        model(torch.randn(2, 2, 4, 4)).square().sum().backward()
        drift(model[0], 1)
        averaged.update(model)
        running = (running + layer.running_mean_square.double()) / 2
    own = averaged.module[0].norm
    assert own.iterations == layer.iterations == 5
    assert torch.equal(own.mean_square_ring.values, layer.mean_square_ring.values)
    target = copy.deepcopy(model)
    if statistics == "estimate":
        batches = [torch.randn(2, 2, 4, 4) for _ in range(2)]
        averaged.estimate_statistics(batches, 2)
        conv = averaged.module[0]
        centred = conv.weight - conv.weight.mean((1, 2, 3), keepdim=True)
        seen = nn.functional.conv2d(torch.cat(batches), centred, conv.bias)
        running = seen.double().square().mean((0, 2, 3))
    averaged.copy_to(target)
    found = target[0].norm.running_mean_square.double()
    if statistics == "copy":
        running = layer.running_mean_square.double()
    torch.testing.assert_close(found, running, rtol=1e-5, atol=1e-6)
    target(torch.randn(2, 2, 4, 4))  # the rings still work
    assert target[0].norm.iterations == 6


def test_resumed_is_bit_equal() -> None:
    model = Net()
    whole = AveragedWeights(model, decay=0.9, statistics="average")
    for step in range(3):
        drift(model, step)
        whole.update(model)
    buffer = io.BytesIO()
    torch.save(whole.state_dict(), buffer)
    buffer.seek(0)
    resumed = AveragedWeights(Net(), decay=0.9, statistics="average")
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for step in range(3, 6):
        drift(model, step)
        whole.update(model)
        resumed.update(model)
    assert resumed.updates == 6
    equal(snapshot(resumed.module), snapshot(whole.module))


def test_a_resumed_average_keeps_its_frozen_layers() -> None:
    model = nn.Sequential(BatchNorm2d(3), nn.BatchNorm2d(3))
    whole = AveragedWeights(model, "swa", statistics="estimate")
    freeze_batch_norm(model[1])
    whole.update(model)
    unfreeze_batch_norm(model)
    resumed = AveragedWeights(model, "swa", statistics="estimate")
    resumed.load_state_dict(whole.state_dict())
    batch = torch.randn(4, 3, 2, 2) + 1
    for averaged in (whole, resumed):  # before the next update
        assert averaged.estimate_statistics([batch], 1).frozen == ("1",)
    equal(snapshot(resumed.module), snapshot(whole.module))


def test_loading_what_does_not_fit_changes_nothing() -> None:
    averaged = AveragedWeights(Net(), "ema")
    before = snapshot(averaged.module)
    other = AveragedWeights(nn.Linear(2, 2), "ema")
    with pytest.raises(ValueError, match="another model"):
        averaged.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="'swa', not 'ema'"):
        averaged.load_state_dict(AveragedWeights(Net(), "swa").state_dict())
    equal(snapshot(averaged.module), before)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("kind", "mean", "ema, swa; got 'mean'"),
        ("statistics", "none", "estimate, average, copy; got 'none'"),
        ("decay", 1.5, "1.5"),
    ],
)
def test_wrong_arguments(name: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*{said}"):
        AveragedWeights(nn.Linear(1, 1), **{name: value})


def test_wrappers_are_looked_through() -> None:
    model = nn.Linear(2, 2)
    averaged = AveragedWeights(nn.DataParallel(model), "swa")
    averaged.update(nn.DataParallel(model))
    averaged.update(model)
    assert list(averaged.module.state_dict()) == ["weight", "bias"]
