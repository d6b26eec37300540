"""Population training of torch's layers in one process, against all that a layer saw, at once."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from rethinking_bn.layers import MultiDomainBatchNorm2d
from rethinking_bn.population import estimate_population_statistics, freeze_batch_norm
from tests.population.cases import (
    Snapshot,
    assert_statistics,
    each_level,
    images,
    seen_statistics,
    small_net,
)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_torch_layers_get_the_moments_of_all_they_saw(
    momentum: float | None, memory_format: torch.memory_format
) -> None:
    model = small_net(momentum=momentum)
    model[4].p = 0.0
    # more forwards than one block of the accumulator holds, of uneven sizes
    batches = [x.to(memory_format=memory_format) for x in images(*[1, 5, 2, 3] * 10)]
    seen: dict[str, list[Tensor]] = {"0": [], "2": [], "6": []}
    for name, inputs in seen.items():
        keep = lambda module, args, inputs=inputs: inputs.append(args[0].clone())  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(keep)
    before = Snapshot(model)
    report = estimate_population_statistics(model, batches, len(batches))
    for name, inputs in seen.items():
        assert_statistics(model.get_submodule(name), inputs, rtol=1e-5, atol=1e-5)
    before.assert_unchanged(buffers=False)
    assert [layer.name for layer in report.layers] == ["0", "2", "6"]
    assert report.layers[0].samples == sum(x.numel() // 3 for x in batches)
    assert model[0].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(4), (6, 4)),
        (nn.BatchNorm1d(4), (3, 4, 5)),
        (nn.BatchNorm3d(4, affine=False), (2, 4, 2, 3, 2)),
        (nn.SyncBatchNorm(4), (2, 4, 3, 2)),
        (nn.SyncBatchNorm(4), (6, 4)),
        (nn.BatchNorm2d(4).double(), (2, 4, 3, 2)),
    ],
)
def test_kinds_of_torch_layers(layer: Any, shape: tuple[int, ...]) -> None:
    dtype = layer.running_mean.dtype
    batches = [torch.randn(shape, dtype=dtype) + 5 for _ in range(3)]
    estimate_population_statistics(layer, batches, 3)
    assert_statistics(layer, batches)


def test_the_model_itself_may_be_the_layer_and_get_its_input_by_keyword() -> None:
    layer, x = nn.BatchNorm2d(3), images(2)[0]
    report = estimate_population_statistics(layer, [x], 1, forward=lambda m, b: m(input=b))
    assert_statistics(layer, [x])
    assert report.layers[0].name == ""


def test_large_mean_and_small_deviation_do_not_cancel() -> None:
    """Defect 5: E[x²] - E[x]² in float32 gives a negative variance here."""
    generator = torch.Generator().manual_seed(0)
    batches = [1e3 + 1e-3 * torch.randn(8, 3, 16, 16, generator=generator) for _ in range(4)]
    model: Any = nn.BatchNorm2d(3)
    estimate_population_statistics(model, batches, 4)
    _, var = seen_statistics(batches)
    torch.testing.assert_close(model.running_var.double(), var, rtol=1e-2, atol=0)
    # MultiDomainBatchNorm2d likewise
    ours: Any = MultiDomainBatchNorm2d(3, 2)
    estimate_population_statistics(ours, [batches[:2], batches[2:]], 2)
    torch.testing.assert_close(ours.running_var.double(), var, rtol=1e-2, atol=0)


def test_uses_within_a_forward_are_pooled() -> None:
    """Defect 2: fvcore refuses a layer that is used more than once."""
    norm = nn.BatchNorm2d(3)
    batches = [images(2, 1, 3, seed=s) for s in range(15)]
    report = estimate_population_statistics(norm, batches, 15, forward=each_level)
    assert_statistics(norm, [x for levels in batches for x in levels])
    assert report.layers[0].samples == sum(x.numel() // 3 for levels in batches for x in levels)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty_inputs_contribute_nothing(shape: tuple[int, ...]) -> None:
    """Defect 3: fvcore divides by the batch size, and leaves the model half changed."""
    empty = torch.empty(shape)
    norm = nn.BatchNorm2d(3, momentum=0.3)
    batches = [images(2), [empty], images(3, seed=5), [empty]]
    estimate_population_statistics(norm, batches, 4, forward=each_level)
    assert_statistics(norm, [batches[0][0], batches[2][0]])
    assert norm.momentum == 0.3
    before = Snapshot(norm)
    report = estimate_population_statistics(norm, [[empty]] * 3, 3, forward=each_level)
    before.assert_unchanged()
    assert report.unreached == ("",)


def test_statistics_that_were_nan_are_replaced() -> None:
    model, batches = small_net(), images(2, 4)
    clean = small_net()
    for module in (model[0], model[2], model[6]):
        module.running_mean.fill_(float("nan"))
        module.running_var.fill_(float("inf"))
    torch.manual_seed(3)
    estimate_population_statistics(clean, batches, 2, seed=0)
    report = estimate_population_statistics(model, batches, 2, seed=0)
    torch.testing.assert_close(dict(model.state_dict()), dict(clean.state_dict()), rtol=0, atol=0)
    assert report.drift == float("inf")


def test_unused_layers_keep_their_statistics_and_are_named() -> None:
    """Defect 6: fvcore writes mean 0 and variance 0."""
    model: Any = nn.Sequential(nn.BatchNorm2d(3))
    model[0].unused = nn.BatchNorm2d(7)
    model[0].unused.running_mean.fill_(2.0)
    model[0].ours = MultiDomainBatchNorm2d(3, 2, population_stats="domain_specific")
    report = estimate_population_statistics(model, images(2, 2), 2)
    assert report.unreached == ("0.unused", "0.ours[0]", "0.ours[1]")
    assert (model[0].unused.running_mean == 2).all() and (model[0].unused.running_var == 1).all()
    assert all((state.running_var == 1).all() for state in model[0].ours.children())


def frozen_and_constant() -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(3), FrozenBatchNorm2d(3))
    freeze_batch_norm(model)
    return model


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (lambda: nn.GroupNorm(1, 3), "the model has no BN-like layer"),
        (lambda: small_net().eval(), r"all 3 BN-like layers are frozen .*train\(\)"),
        (frozen_and_constant, r"\(1 frozen by .*: call unfreeze_batch_norm .*; 1 .*thaw=True"),
        (lambda: torch.jit.script(small_net()), "scripted"),
        (lambda: nn.BatchNorm2d(3, track_running_stats=False), "keep no statistics"),
    ],
)
def test_nothing_to_estimate_is_an_error_unless_allowed(kind, why, caplog) -> None:  # defect 34
    model = kind()
    before, consumed = Snapshot(model), iter(images(2, 2))
    with pytest.raises(ValueError, match=f"nothing to estimate: .*{why}"):
        estimate_population_statistics(model, consumed, 2)
    with caplog.at_level(logging.INFO, "rethinking_bn.population"):
        report = estimate_population_statistics(model, consumed, 2, allow_empty=True)
    before.assert_unchanged()
    assert report.layers == () and report.num_batches == 0 and len(list(consumed)) == 2
    assert re.search(why, caplog.text) and len(caplog.records) == 1


def test_first_layer_does_not_depend_on_the_split_and_no_layer_on_the_order() -> None:
    data = torch.randn(24, 3, 5, 5, generator=torch.Generator().manual_seed(2)) * 3 + 1
    results = []
    for sizes in ([24], [6] * 4, [1, 2, 21], [20, 3, 1]):
        model = small_net()
        estimate_population_statistics(model, data.split(sizes), len(sizes))
        results.append(model[0].state_dict())
    for result in results[1:]:
        torch.testing.assert_close(dict(result), dict(results[0]), rtol=1e-6, atol=1e-6)
    batches, models = images(1, 4, 2, 3), [small_net(), small_net()]
    for model, order in zip(models, (batches, batches[::-1]), strict=True):
        model[4].p = 0.0
        estimate_population_statistics(model, order, 4)
    states = [dict(model.state_dict()) for model in models]
    torch.testing.assert_close(states[0], states[1], rtol=1e-6, atol=1e-6)


def test_shared_modules_and_wrappers() -> None:
    model: Any = nn.Sequential(nn.BatchNorm2d(3))
    model.append(model[0])
    batches = images(2, 3)
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        report = estimate_population_statistics(wrapped, batches, 2)
        assert [layer.name for layer in report.layers] == ["0"]
        once = [nn.functional.batch_norm(x, None, None, training=True) for x in batches]
        assert_statistics(model[0], batches + once)


def test_calls_past_the_hooks_do_no_damage() -> None:
    model: Any = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    batches = images(2, 3)

    def forward(norms: Any, x: Tensor) -> None:
        norms[0](x), norms[0].forward(10 * x), norms[1].forward(x)

    report = estimate_population_statistics(model, batches, 2, forward=forward)
    assert_statistics(model[0], batches)
    assert report.unreached == ("1",) and (model[1].running_var == 1).all()
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = small_net().to(dtype)
    model[4].p = 0.0
    halves = [x.to(dtype) for x in images(2, 3)]
    estimate_population_statistics(model, halves, 2)
    mean, var = seen_statistics(halves)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(model[0].running_mean.double(), mean, rtol=eps, atol=0)
    torch.testing.assert_close(model[0].running_var.double(), var, rtol=eps, atol=0)


def test_autocast_is_the_one_given_or_the_one_around() -> None:
    batches = images(2, 3)
    model = small_net()
    types: list[torch.dtype] = []
    model[2].register_forward_hook(lambda m, args, out: types.append(args[0].dtype))

    def bfloat16() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    estimate_population_statistics(model, batches, 2, autocast=bfloat16)
    with bfloat16():
        estimate_population_statistics(model, batches, 2)
    estimate_population_statistics(model, batches, 2)
    assert types == [torch.bfloat16] * 4 + [torch.float32] * 2
    assert model[2].running_var.dtype == torch.float32


def test_overflow_of_half_buffers_is_an_error() -> None:
    model: Any = nn.BatchNorm2d(3).half()
    before = Snapshot(model)
    with pytest.raises(FloatingPointError, match="overflow the type"):
        estimate_population_statistics(model, [x.half() * 3000 for x in images(2)], 1)
    before.assert_unchanged()
