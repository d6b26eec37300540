from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rethinking_bn.layers import MultiDomainBatchNorm2d
from tests import reference
from tests.reference import CHANNELS, SHAPES

CHOICES = ("shared", "domain_specific")
ALL_EIGHT = list(itertools.product(CHOICES, repeat=3))
L = len(SHAPES)


def build(train: str, population: str, affine: str, **options: object) -> MultiDomainBatchNorm2d:
    layer = MultiDomainBatchNorm2d(
        CHANNELS,
        L,
        train_stats=train,
        population_stats=population,
        affine=affine,
        **{"dtype": torch.float64, **options},
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(CHANNELS, generator=generator, dtype=torch.float64) + 0.5)
    return layer


def affine_of(layer: MultiDomainBatchNorm2d, level: int) -> tuple[Tensor, Tensor]:
    holder = layer if layer.affine == "shared" else layer.get_submodule(str(level))
    return holder.weight, holder.bias


@pytest.mark.parametrize(("train", "population", "affine"), ALL_EIGHT)
def test_training_equals_the_written_out_reference(
    train: str, population: str, affine: str
) -> None:
    layer = build(train, population, affine)
    mine = [x.requires_grad_() for x in reference.levels()]
    ys = layer(mine)
    reference.loss(ys).backward()
    grads = {name: p.grad.clone() for name, p in layer.named_parameters()}

    layer.zero_grad()
    theirs = [x.requires_grad_() for x in reference.levels()]
    expected = []
    for level, x in enumerate(theirs):
        over = theirs if train == "shared" else [x]
        expected += reference.normalize([x], over, *affine_of(layer, level))
    reference.loss(expected).backward()
    for y, z in zip(ys, expected, strict=True):
        torch.testing.assert_close(y, z)
    for x, z in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x.grad, z.grad)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


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
    choices = {
        1: ("shared", "shared", "shared"),
        3: ("domain_specific", "shared", "shared"),
        6: ("domain_specific",) * 3,
    }[row]
    shapes = [(6, 8), (3, 4), (2, 2), (2, 1)]  # nn.BatchNorm2d refuses a single value
    layer = MultiDomainBatchNorm2d(
        CHANNELS,
        L,
        train_stats=choices[0],
        population_stats=choices[1],
        affine=choices[2],
        momentum=momentum,
    )
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


def test_nothing_at_all_leaves_everything_alone() -> None:
    layer = build("shared", "shared", "shared")
    before = copy.deepcopy(layer.state_dict())
    inputs = [x[:0].requires_grad_() for x in reference.levels()]
    reference.loss(layer(inputs)).backward()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert not layer.weight.grad.any()


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


def test_it_is_no_torch_batch_norm() -> None:
    """Tools that look for torch's classes would treat it as a layer with one set of statistics."""
    assert not isinstance(MultiDomainBatchNorm2d(1, 1), nn.modules.batchnorm._BatchNorm)


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


def test_deepcopy_and_pickled_state_continue_alike() -> None:
    layer = build("shared", "domain_specific", "shared")
    layer(reference.levels())
    other = copy.deepcopy(layer)
    for x, y in zip(layer(reference.levels(1)), other(reference.levels(1)), strict=True):
        assert torch.equal(x, y)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
