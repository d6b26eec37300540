from __future__ import annotations

import pytest
import torch

from rethinking_bn.layers import (
    Moments,
    MultiDomainBatchNorm2d,
    local_moments,
    merge_moments,
    mix_statistics,
)
from rethinking_bn.numerics.moments import combine, gradient_sums
from rethinking_bn.numerics.normalize import normalize
from tests import reference


def stack_moments(moments: list[Moments]) -> Moments:
    return Moments(*(torch.stack(values) for values in zip(*moments, strict=True)))


def test_merging_moments_equals_the_moments_of_everything() -> None:
    xs = reference.levels()
    merged = merge_moments(*stack_moments([local_moments(x) for x in xs]))
    values = reference.values_per_channel(xs)
    assert merged.count == values.shape[1]
    torch.testing.assert_close(merged.mean, values.mean(1))
    torch.testing.assert_close(merged.variance(unbiased=True), values.var(1))
    torch.testing.assert_close(merged.variance(), values.var(1, unbiased=False))


def test_merging_is_independent_of_order_and_grouping() -> None:
    rows = stack_moments([local_moments(x) for x in reference.levels()])
    backwards = merge_moments(*(v.flip(0) for v in rows))
    halves = [merge_moments(*(v[s] for v in rows)) for s in (slice(0, 1), slice(1, None))]
    for other in (backwards, merge_moments(*stack_moments(halves))):
        for a, b in zip(merge_moments(*rows), other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_empty_sets_contribute_nothing_even_when_their_mean_is_nan() -> None:
    nan = torch.full((3,), float("nan"))
    some = local_moments(torch.randn(4, 3, 2, 2))
    rows = stack_moments([Moments(torch.tensor(0.0), nan, nan), some])
    for got, expected in zip(merge_moments(*rows), some, strict=True):
        torch.testing.assert_close(got, expected)
    nothing = merge_moments(*(v[:1] for v in rows))
    assert nothing.count == 0 and not nothing.mean.any() and not nothing.variance().any()


def test_large_mean_small_spread_keeps_its_variance() -> None:
    """E[x²] - E[x]² would give 0 or a negative number here."""
    x = 1e3 + 1e-3 * torch.randn(8, 2, 40, 40, generator=torch.Generator().manual_seed(0))
    got = merge_moments(*stack_moments([local_moments(half) for half in x.chunk(2)])).variance()
    expected = reference.values_per_channel([x.double()]).var(1, unbiased=False)
    torch.testing.assert_close(got.double(), expected, rtol=0.01, atol=0)


def test_mixture_is_the_pooled_population_of_equal_parts() -> None:
    parts = [torch.randn(3, 100, dtype=torch.float64) * (i + 1) + i for i in range(4)]
    mean, variance = mix_statistics(
        torch.stack([p.mean(1) for p in parts]),
        torch.stack([p.var(1, unbiased=False) for p in parts]),
    )
    together = torch.cat(parts, 1)
    torch.testing.assert_close(mean, together.mean(1))
    torch.testing.assert_close(variance, together.var(1, unbiased=False))


def test_an_expanded_gradient_is_read_correctly() -> None:
    """The gradient of a sum is one element expanded to the whole shape."""
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    y = normalize([x], weight, bias, parts=[0], pools=[0], eps=1e-5).outputs[0]
    y.sum().backward()
    assert x.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad, torch.zeros_like(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 18.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 30, 60, 50), (1, 2, 700, 600)], ids=str)
def test_combine_rounds_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Terms that nearly cancel, in tensors below and above the size that is done in blocks."""
    x = torch.randn(shape).to(dtype)
    dy = (0.999 * x.float()).to(dtype)
    a, b, c = torch.rand(3, shape[1]) + 1
    b = -a + 0.01 * b
    none = torch.zeros(shape[1])
    got = combine(dy, x, a, b, c, none, none, eps=1.0)
    wide = [v.double().view(1, -1, 1, 1) for v in (a, b, c)]
    expected = wide[0] * dy.double() + wide[1] * x.double() + wide[2]
    assert got.dtype == dtype and got.is_contiguous()
    half_ulp = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(got.double(), expected, rtol=1.01 * half_ulp, atol=1e-6)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (dy, x)]
    torch.testing.assert_close(
        combine(last[0], last[1], a, b, c, none, none, eps=1.0), got, rtol=2 * half_ulp, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["crop", "channels", "transposed"])
def test_gradients_of_half_types_with_any_strides(dtype: torch.dtype, where: str) -> None:
    """Sums are kept in float32 whatever the strides of the input."""
    whole = torch.randn(4, 8, 30, 28).to(dtype)
    x = {
        "crop": whole[:, :, 3:, 5:],
        "channels": whole[:, 2:6],
        "transposed": whole.transpose(2, 3),
    }[where]
    dy = (torch.randn(x.shape) + 5).to(dtype)
    mean, variance = torch.randn(x.shape[1]), torch.rand(x.shape[1]) + 0.5
    got = gradient_sums(dy, x, mean, variance, 1e-5)
    wide = [v.double().view(1, -1, 1, 1) for v in (mean, variance)]
    normalized = (x.double() - wide[0]) / (wide[1] + 1e-5).sqrt()
    torch.testing.assert_close(got[0].double(), dy.double().sum((0, 2, 3)), rtol=1e-5, atol=1e-3)
    expected = (dy.double() * normalized).sum((0, 2, 3))
    torch.testing.assert_close(got[1].double(), expected, rtol=1e-5, atol=2e-2)


@pytest.mark.parametrize("half_first", [False, True])
def test_each_level_comes_back_in_its_own_type(half_first: bool) -> None:
    xs = [torch.randn(3, 2, size, size, requires_grad=True) for size in (4, 2)]
    xs[not half_first] = xs[not half_first].detach().bfloat16().requires_grad_()
    ys = MultiDomainBatchNorm2d(2, 2)(xs)
    sum(y.float().square().sum() for y in ys).backward()
    for x, y in zip(xs, ys, strict=True):
        assert y.dtype == x.dtype and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_local_moments_accumulate_in_float32(dtype: torch.dtype, channels_last: bool) -> None:
    x = (torch.randn(2, 3, 50, 40) * 2 + 5).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    got = local_moments(x)
    values = reference.values_per_channel([x.double()])
    assert got.mean.dtype == torch.float32
    torch.testing.assert_close(got.mean.double(), values.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        got.m2.double() / got.count, values.var(1, unbiased=False), rtol=1e-4, atol=1e-4
    )


# Above the size from which contiguous tensors are added up block by block: one block, several
# blocks with a last one that is not full, planes longer than a block, more than two dimensions.
PLANAR = [(3, 50, 21, 23), (2, 70, 90, 60), (2, 1, 600, 500), (5, 300, 64), (2, 8, 9, 25, 20)]


@pytest.mark.parametrize("shape", PLANAR, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("mean", "std"), [(3.0, 2.0), (1e3, 1e-3), (-1e-6, 1e-8)])
def test_large_contiguous_tensors(
    shape: tuple[int, ...], dtype: torch.dtype, mean: float, std: float
) -> None:
    x = (mean + std * torch.randn(shape, dtype=torch.float64)).to(dtype)
    got, before = local_moments(x.requires_grad_()), x.detach().clone()
    values = x.detach().double().transpose(0, 1).flatten(1)
    assert got.mean.dtype == got.m2.dtype == dtype and not got.m2.requires_grad
    assert got.count == values.shape[1] and torch.equal(x, before)
    tight = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(got.mean.double(), values.mean(1), rtol=tight, atol=0)
    spread = (values - values.mean(1, keepdim=True)).square().sum(1)
    torch.testing.assert_close(got.m2.double(), spread, rtol=10 * tight, atol=0)


def test_large_contiguous_tensors_of_one_value_or_not_finite() -> None:
    x = torch.randn(4, 6, 60, 50)
    x[:, 1], x[:, 2], x[0, 3, 0, 0], x[1, 4, 2, 2] = 7.1, 0.0, float("inf"), float("nan")
    got = local_moments(x)
    assert got.m2[1] <= 1e-6 and got.m2[2] == 0 and (got.m2[[0, 5]] > 0).all()
    assert not got.mean[[3, 4]].isfinite().any() and got.m2[[3, 4]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_values_in_channels_last_keep_their_digits(dtype: torch.dtype) -> None:
    """The CPU's kernel alone is off by 1e-3 standard deviations here, and by 2 at a mean of 1e3."""
    x = (100 + torch.randn(1, 2, 300, 401)).to(dtype).to(memory_format=torch.channels_last)
    got = local_moments(x)
    values = reference.values_per_channel([x.double()])
    assert got.count == values.shape[1] and got.mean.dtype == torch.float32
    torch.testing.assert_close(got.mean.double(), values.mean(1), rtol=0, atol=2e-4)
    expected = values.var(1, unbiased=False)
    torch.testing.assert_close(got.variance().double(), expected, rtol=5e-5, atol=0)
    one_over = x[:, :, :17, :241]  # 4097 values: a block of a single one
    assert one_over.numel() == 2 * 4097
    one_over = one_over.to(memory_format=torch.channels_last, copy=True)
    torch.testing.assert_close(
        local_moments(one_over).variance().double(),
        reference.values_per_channel([one_over.double()]).var(1, unbiased=False),
        rtol=5e-5,
        atol=0,
    )
