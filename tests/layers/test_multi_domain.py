from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rethinking_bn.layers import MultiDomainBatchNorm2d
from rethinking_bn.layers.multi_domain import TABLE_5
from tests import reference
from tests.layers.kinds import ALL_EIGHT, affine_of, with_choices
from tests.reference import CHANNELS, SHAPES

L = len(SHAPES)


def build(*choices: str, **options: Any) -> MultiDomainBatchNorm2d:
    layer = with_choices(choices, **{"dtype": torch.float64, **options})
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return layer


@pytest.mark.parametrize(("train", "population", "affine"), ALL_EIGHT)
def test_training_equals_the_written_out_reference(
    train: str, population: str, affine: str
) -> None:
    layer = build(train, population, affine)
    xs = [x.requires_grad_() for x in reference.levels()]
    inputs, ys, expected = [*xs, *layer.parameters()], layer(xs), []
    for level, x in enumerate(xs):
        over = xs if train == "shared" else [x]
        expected += reference.normalize([x], over, *affine_of(layer, level))
    torch.testing.assert_close(ys, expected)
    found, wanted = (torch.autograd.grad(reference.loss(out), inputs) for out in (ys, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("train", "population", "affine"), ALL_EIGHT)
@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_running_statistics(train: str, population: str, affine: str, momentum: float) -> None:
    layer = build(train, population, affine, momentum=momentum)
    sets = 1 if population == "shared" else L
    mean = [torch.zeros(CHANNELS, dtype=torch.float64)] * sets
    var = [torch.ones(CHANNELS, dtype=torch.float64)] * sets
    for step in range(3):
        xs = reference.levels(seed=step)
        layer(xs)
        if population == "domain_specific":
            for k in range(L):
                mean[k], var[k] = reference.ema(mean[k], var[k], [xs[k]], momentum)
        elif train == "shared":
            mean[0], var[0] = reference.ema(mean[0], var[0], xs, momentum)
        else:  # one step a level, one level after the other
            for x in xs:
                mean[0], var[0] = reference.ema(mean[0], var[0], [x], momentum)
    got_mean, got_var = layer.read_population()
    torch.testing.assert_close(got_mean, torch.stack(mean))
    torch.testing.assert_close(got_var, torch.stack(var))


def _concatenated(bn: nn.BatchNorm2d) -> Callable[[list[Tensor]], list[Tensor]]:
    def run(xs: list[Tensor]) -> list[Tensor]:
        y = bn(torch.cat([x.flatten(2) for x in xs], 2).unsqueeze(3))
        pieces = y.split([x[0, 0].numel() for x in xs], 2)
        return [piece.reshape(x.shape) for piece, x in zip(pieces, xs, strict=True)]

    return run


@pytest.mark.parametrize("row", [1, 3, 6])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("channels_last", [False, True])
def test_rows_equal_torch_batch_norm(row: int, momentum: float | None, channels_last: bool) -> None:
    """float32: row 1 concatenated, row 3 one BN level after level, row 6 separate BNs."""
    shapes = [(6, 8), (3, 4), (2, 2), (2, 1)]  # nn.BatchNorm2d refuses a single value
    layer = MultiDomainBatchNorm2d(CHANNELS, L, **TABLE_5[row], momentum=momentum)
    bns = nn.ModuleList(
        nn.BatchNorm2d(CHANNELS, momentum=momentum) for _ in range(L if row == 6 else 1)
    )
    run = _concatenated(bns[0]) if row == 1 else None
    for step in range(3):
        xs = [x.float() for x in reference.levels(seed=step, shapes=shapes)]
        if channels_last:
            xs = [x.to(memory_format=torch.channels_last) for x in xs]
        mine = [x.clone().requires_grad_() for x in xs]
        theirs = [x.clone().requires_grad_() for x in xs]
        ys = layer(mine)
        zs = run(theirs) if run else [bns[i % len(bns)](x) for i, x in enumerate(theirs)]
        reference.loss(ys).backward()
        reference.loss(zs).backward()
        for y, z, x, v in zip(ys, zs, mine, theirs, strict=True):
            torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(x.grad, v.grad, rtol=1e-3, atol=1e-4)
            assert y.is_contiguous(memory_format=torch.channels_last) or not channels_last
    stats = [(b.running_mean, b.running_var) for b in bns]
    mean, var = layer.read_population()
    torch.testing.assert_close(mean, torch.stack([s[0] for s in stats]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(var, torch.stack([s[1] for s in stats]), rtol=1e-4, atol=1e-4)
    tracked = [v for k, v in layer.state_dict().items() if k.endswith("num_batches_tracked")]
    assert tracked == [b.num_batches_tracked for b in bns]
    layer.eval(), bns.eval()
    for i, y in enumerate(layer(xs)):
        torch.testing.assert_close(y, bns[i % len(bns)](xs[i]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_use_float32_statistics(dtype: torch.dtype) -> None:
    layer = MultiDomainBatchNorm2d(CHANNELS, L)
    xs = [x.to(dtype) for x in reference.levels(shapes=[(20, 30), (10, 15), (5, 8), (3, 4)])]
    mine = [x.clone().requires_grad_() for x in xs]
    ys = layer(mine)
    assert all(y.dtype == dtype for y in ys)
    assert layer.running_mean.dtype == torch.float32
    theirs = [x.double().requires_grad_() for x in xs]
    ones = torch.ones(CHANNELS, dtype=torch.float64)
    zs = reference.normalize(theirs, theirs, ones, ones * 0)
    for y, z in zip(ys, zs, strict=True):
        torch.testing.assert_close(y.double(), z, rtol=2e-2, atol=2e-2)
    # the statistics themselves are far more exact than the type of the input
    mean, _ = reference.ema(ones * 0, ones, theirs)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.autograd.backward(ys, [torch.ones_like(y) * (i + 1) for i, y in enumerate(ys)])
    torch.autograd.backward(zs, [torch.ones_like(z) * (i + 1) for i, z in enumerate(zs)])
    for x, v in zip(mine, theirs, strict=True):
        assert x.grad.dtype == dtype
        torch.testing.assert_close(x.grad.double(), v.grad, rtol=3e-2, atol=2e-3)


@pytest.mark.parametrize(("train", "population", "affine"), ALL_EIGHT)
def test_an_empty_level_leaves_its_statistics_alone(
    train: str, population: str, affine: str
) -> None:
    layer = build(train, population, affine)
    xs = reference.levels()
    xs[1] = xs[1][:0]
    inputs = [x.requires_grad_() for x in xs]
    ys = layer(inputs)
    assert ys[1].shape == xs[1].shape
    reference.loss(ys).backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs)
    assert all(torch.isfinite(v).all() for v in layer.state_dict().values())
    if population == "domain_specific":
        assert not layer.get_buffer("1.running_mean").any()
        assert layer.get_buffer("1.num_batches_tracked") == 0
    layer.eval()
    assert layer(xs)[1].shape == xs[1].shape


def test_one_value_per_channel_has_variance_zero_and_leaves_running_var_alone() -> None:
    layer = MultiDomainBatchNorm2d(CHANNELS, 1, momentum=0.5)
    x = torch.randn(1, CHANNELS, 1, 1)
    (y,) = layer([x])
    torch.testing.assert_close(y, torch.zeros_like(y), atol=1e-4, rtol=0)  # the bias
    assert torch.equal(layer.running_var, torch.ones(CHANNELS))
    torch.testing.assert_close(layer.running_mean, x.flatten() / 2)


def test_levels_are_told_apart_by_their_place_after_an_interrupted_pass() -> None:
    layer = build("domain_specific", "domain_specific", "shared").eval()
    for level in range(L):
        layer.get_buffer(f"{level}.running_mean").fill_(level)
    xs = reference.levels()
    expected = layer(xs)
    with pytest.raises(ValueError, match="level 2"):
        layer([*xs[:2], xs[2][:, :1], xs[3]])
    for y, z in zip(layer(xs), expected, strict=True):
        assert torch.equal(y, z)


@pytest.mark.parametrize(
    ("name", "value"), [("train_stats", "Shared"), ("population_stats", ""), ("affine", "both")]
)
def test_unknown_choice_names_the_choices(name: str, value: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{name} must be one of .*shared.*domain_specific.*{value}"
    ):
        MultiDomainBatchNorm2d(CHANNELS, L, **{name: value})


def test_wrong_inputs() -> None:
    layer = MultiDomainBatchNorm2d(CHANNELS, L)
    with pytest.raises(ValueError, match="list of 4 tensors, got 2"):
        layer([torch.zeros(1, CHANNELS, 1, 1)] * 2)
    with pytest.raises(ValueError, match="got a tensor"):
        layer(torch.zeros(4, CHANNELS, 1, 1))
    with pytest.raises(ValueError, match="num_domains must be at least 1"):
        MultiDomainBatchNorm2d(CHANNELS, 0)


@pytest.mark.parametrize(("train", "population", "affine"), ALL_EIGHT)
def test_observing(train: str, population: str, affine: str) -> None:
    layer = build(train, population, affine)
    before = copy.deepcopy(layer.state_dict())
    xs = reference.levels()
    seen = []
    with layer.observing(seen.append):
        ys = layer(xs)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    (moments,) = seen
    sets = [xs] if population == "shared" else [[x] for x in xs]
    assert len(layer.population_domains) == len(sets) == len(moments.mean)
    for row, over in enumerate(sets):
        values = reference.values_per_channel(over)
        assert moments.count[row] == values.shape[1]
        torch.testing.assert_close(moments.mean[row], values.mean(1))
        torch.testing.assert_close(moments.m2[row] / values.shape[1], values.var(1, unbiased=False))
    for level, x in enumerate(xs):  # normalised in the population paradigm
        over = xs if population == "shared" else [x]
        torch.testing.assert_close(
            [ys[level]], reference.normalize([x], over, *affine_of(layer, level))
        )
    layer.write_population(moments)
    mean, _ = layer.read_population()
    torch.testing.assert_close(mean, moments.mean)


def test_a_copy_made_while_observing_is_not_observed() -> None:
    layer, seen = build("shared", "shared", "shared"), []
    with layer.observing(seen.append):
        other = copy.deepcopy(layer)
    other(reference.levels())
    assert seen == [] and other.num_batches_tracked == 1


def test_shared_keys_equal_batch_norm_and_domain_keys_cycle_list() -> None:
    assert (
        build("shared", "shared", "shared").state_dict().keys()
        == nn.BatchNorm2d(1).state_dict().keys()
    )
    separate = nn.ModuleList(nn.BatchNorm2d(1, affine=False) for _ in range(L))
    got = set(build("domain_specific", "domain_specific", "shared").state_dict())
    assert got == {"weight", "bias", *separate.state_dict()}


def test_domain_specific_checkpoint_becomes_shared_as_a_mixture(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, target = (
        build("shared", "domain_specific", "shared"),
        build("shared", "shared", "shared"),
    )
    source(reference.levels())
    caplog.set_level(logging.INFO, "rethinking_bn")
    target.load_state_dict(source.state_dict())
    mean, var = source.read_population()
    torch.testing.assert_close(target.running_mean, mean.mean(0))
    torch.testing.assert_close(target.running_var, var.mean(0) + mean.var(0, unbiased=False))
    assert "population training is due" in caplog.text


def test_shared_checkpoint_is_copied_to_every_domain() -> None:
    source, target = build("shared", "shared", "shared"), build(*("domain_specific",) * 3)
    source(reference.levels())
    target.load_state_dict(source.state_dict())
    for level in range(L):
        for name in ("running_mean", "running_var", "weight", "bias", "num_batches_tracked"):
            assert torch.equal(
                getattr(target.get_submodule(str(level)), name), getattr(source, name)
            )


@pytest.mark.parametrize("assign", [False, True])
def test_domains_share_no_memory_after_conversion(assign: bool) -> None:
    target = build(*("domain_specific",) * 3)
    target.load_state_dict(build("shared", "shared", "shared").state_dict(), assign=assign)
    pointers = [value.data_ptr() for value in target.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


def test_unconvertible_checkpoints_name_the_key() -> None:
    target = nn.ModuleDict({"norm": build("shared", "shared", "shared")})
    affine_only = {"norm.weight": torch.ones(CHANNELS), "norm.bias": torch.zeros(CHANNELS)}
    with pytest.raises(RuntimeError, match=r"norm\.running_mean is not in the checkpoint"):
        target.load_state_dict(affine_only, strict=False)
    separate = {
        f"norm.{k}": v for k, v in build("shared", "shared", "domain_specific").state_dict().items()
    }
    with pytest.raises(RuntimeError, match=r"norm\.weight: 4 different affines"):
        target.load_state_dict(separate, strict=False)
    more = MultiDomainBatchNorm2d(CHANNELS, L + 1, population_stats="domain_specific")
    with pytest.raises(RuntimeError, match=r"norm\.4\.running_mean.*more domains"):
        target.load_state_dict({f"norm.{k}": v for k, v in more.state_dict().items()}, strict=False)
    row_5 = MultiDomainBatchNorm2d(CHANNELS, L + 1, affine="domain_specific")
    with pytest.raises(RuntimeError, match=r"4\.weight.*more domains"):
        build("shared", "shared", "domain_specific").load_state_dict(
            row_5.state_dict(), strict=False
        )


def test_a_checkpoint_without_the_layer_leaves_it_fresh() -> None:
    target = nn.ModuleDict({"norm": build("shared", "shared", "shared")})
    result = target.load_state_dict({"backbone.weight": torch.ones(1)}, strict=False)
    assert "norm.running_mean" in result.missing_keys
