"""Moments of one tensor: every layout, type and size against float64."""

from __future__ import annotations

import pytest
import torch

from rethinking_bn.layers import local_moments
from tests import reference


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
