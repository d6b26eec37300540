"""CenConv2d: centred filters, projected gradients, detectron2's extras."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rethinking_bn.layers.mabn import CenConv2d

CASES: list[dict[str, Any]] = [
    {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1},
    {"in_channels": 4, "out_channels": 6, "kernel_size": 1, "stride": 2, "bias": False},
    {"in_channels": 4, "out_channels": 8, "kernel_size": (1, 3), "groups": 4, "dilation": 2},
    {"in_channels": 4, "out_channels": 6, "kernel_size": 2, "padding_mode": "reflect"},
]


def centred(weight: Tensor) -> Tensor:
    rows = weight.flatten(1)
    return torch.stack([row - row.sum() / len(row) for row in rows]).view_as(weight)


@pytest.mark.parametrize("options", CASES)
def test_equals_a_convolution_with_centred_filters(options):
    layer = CenConv2d(**options).double()
    plain = nn.Conv2d(**options).double()
    plain.load_state_dict(layer.state_dict())
    plain.weight.data = centred(plain.weight.data)
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(a), plain(b)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(a.grad, b.grad)
    # the gradient of the raw filter is the projection of that of the centred one
    assert layer.weight.grad is not None and plain.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, centred(plain.weight.grad))
    if layer.bias is not None and plain.bias is not None:
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


def test_gradcheck():
    layer = CenConv2d(2, 3, 2).double()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    weight = torch.randn_like(layer.weight).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, weight))
    layer.eval()
    (gradient,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    torch.testing.assert_close(gradient, centred(gradient))


def test_a_shift_of_a_filter_changes_nothing():
    layer = CenConv2d(4, 6, 3)
    x = torch.randn(1, 4, 5, 5)
    before = layer(x)
    with torch.no_grad():
        layer.weight += torch.arange(6.0).view(6, 1, 1, 1)
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)


def test_norm_and_activation_in_detectron2s_order():
    norm = nn.GroupNorm(2, 6)
    layer = CenConv2d(4, 6, 3, norm=norm, activation=F.relu)
    assert layer.norm is norm and layer.activation is F.relu
    x = torch.randn(2, 4, 5, 5)
    expected = F.relu(norm(F.conv2d(x, centred(layer.weight), layer.bias)))
    torch.testing.assert_close(layer(x), expected)
    assert set(layer.state_dict()) == {"weight", "bias", "norm.weight", "norm.bias"}
    assert CenConv2d(4, 6, 3).norm is None


def test_state_dict_is_that_of_the_convolution():
    plain, layer = nn.Conv2d(4, 6, 3), CenConv2d(4, 6, 3)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.weight, plain.weight)  # stored as it is, with its mean
    plain.load_state_dict(layer.state_dict())


def test_empty_input():
    layer = CenConv2d(4, 6, 3, padding=1, norm=nn.BatchNorm2d(6).eval(), activation=F.relu)
    x = torch.empty(0, 4, 5, 5, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 6, 5, 5)
    y.sum().backward()
    assert layer.weight.grad is not None and not layer.weight.grad.any()


def test_autocast():
    layer = CenConv2d(4, 6, 3)
    x = torch.randn(2, 4, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("options", [{"groups": 4}, {"in_channels": 1}])
def test_filters_of_one_weight_are_refused(options):
    with pytest.raises(ValueError, match="centred, it is always 0"):
        CenConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 1, **options})
