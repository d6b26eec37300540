"""MABN2d and CenConv2d against their formulas: outputs, gradients, types, shapes, arguments."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from rethinking_bn.layers.mabn import CenConv2d, MABN2d
from tests.layers.mabn.reference import Reference

C = 3


def layer_and_reference(m: int, warmup: int, **options: Any) -> tuple[MABN2d, Reference]:
    layer = MABN2d(C, simulated_batch_size=2 * m, batch_size=2, warmup_iters=warmup, **options)
    return layer.double(), Reference(m, warmup, **options)


def drifting(t: int, generator: torch.Generator) -> Tensor:
    """Activations whose scale wanders and jumps, so that S, R and r differ."""
    scale = 1 + 0.8 * torch.sin(torch.tensor(t / 40.0)) + (3.0 if t % 97 == 0 else 0.0)
    x = torch.randn(2, C, 3, 2, generator=generator, dtype=torch.float64)
    return x * scale * torch.tensor([0.3, 1.0, 4.0]).view(1, C, 1, 1) + 0.2


@pytest.mark.parametrize(
    "m, warmup, options, iterations",
    [
        # warm-up (10), ring and correction (1000) boundaries with the paper's constants
        (4, 10, {"r_max": 1.2}, 1100),
        # the paper's own configuration
        pytest.param(16, 100, {}, 1500, marks=pytest.mark.slow),
        # the ring fills after the warm-up; all boundaries early; wide momentum
        (16, 3, {"correction_start": 40, "r_max": 1.05, "momentum": 0.3}, 300),
        # the correction waits for the warm-up
        (2, 60, {"correction_start": 20, "r_max": 1.1}, 300),
        # nothing simulated
        (1, 0, {"correction_start": 0, "r_max": 1.1}, 100),
    ],
)
def test_equals_the_formulas(m, warmup, options, iterations):
    layer, reference = layer_and_reference(m, warmup, **options)
    generator = torch.Generator().manual_seed(m)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -1.5, 2.0]))
        layer.bias.copy_(torch.tensor([0.1, 0.2, -3.0]))
    for t in range(1, iterations + 1):
        x = drifting(t, generator).requires_grad_()
        dy = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        expected = reference.forward(x.detach(), layer.weight.detach(), layer.bias.detach())
        dx, dweight, dbias = reference.backward(dy)
        y = layer(x)
        grads = torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)
        for got, want in zip((y, *grads), (expected, dx, dweight, dbias), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=f"iteration {t}")
        torch.testing.assert_close(layer.running_mean_square, reference.R, rtol=1e-11, atol=0)
    assert layer.iterations == iterations
    assert "moving" in reference.visited
    if "r_max" in options:
        assert {"low", "high", "inside"} <= reference.visited
    if m > 1:
        assert "own" in reference.visited


def test_constants_are_those_of_the_paper():
    layer = MABN2d(C)
    assert (layer.simulated_batch_size, layer.eps, layer.momentum) == (32, 1e-5, 0.02)
    assert (layer.warmup_iters, layer.correction_start, layer.r_max) == (100, 1000, 5.0)


def test_gradcheck_while_observed():
    layer, _ = layer_and_reference(4, 10)
    x = torch.randn(2, C, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([0.1, 0.2, -3.0], dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    with layer.observing(lambda moments: None):
        assert torch.autograd.gradcheck(run, (x, weight, bias))
    assert layer.iterations == 0


def test_a_derivative_of_the_backward_is_refused():
    """Also where the incoming gradient needs none, as of a loss that is linear in the output."""
    layer, _ = layer_and_reference(4, 10)
    x = torch.randn(2, C, 3, 2, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        (grad.square().sum() + x.sum()).backward()


def test_a_list_shares_its_statistics():
    """Several tensors in one call are one iteration, equal to their concatenation along space."""
    listed, _ = layer_and_reference(3, 2, correction_start=5, r_max=1.05)
    joined = copy.deepcopy(listed)
    for _ in range(12):
        xs = [
            (torch.randn(2, C, 1, w, dtype=torch.float64) * w).requires_grad_() for w in (5, 2, 1)
        ]
        dys = [torch.randn_like(x) for x in xs]
        ys = listed([*xs, torch.empty(0, C, 4, 4, dtype=torch.float64)])
        assert isinstance(ys, list) and ys.pop().shape == (0, C, 4, 4)
        grads = torch.autograd.grad(ys, [*xs, listed.weight, listed.bias], dys)
        x = torch.cat([x.detach() for x in xs], dim=3).requires_grad_()
        y = joined(x)
        expected = torch.autograd.grad(y, [x, joined.weight, joined.bias], torch.cat(dys, dim=3))
        torch.testing.assert_close(torch.cat(ys, dim=3), y)
        torch.testing.assert_close(torch.cat(grads[:3], dim=3), expected[0])
        torch.testing.assert_close(grads[3:], expected[1:])
    torch.testing.assert_close(listed.state_dict(), joined.state_dict())
    assert listed.iterations == 12


def test_a_list_with_an_unused_output():
    layer, _ = layer_and_reference(2, 0)
    xs = [torch.randn(2, C, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    layer(xs)[0].sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in xs)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_inference_is_one_affine():
    layer, _ = layer_and_reference(2, 0)
    for _ in range(4):
        layer(torch.randn(2, C, 3, 2, dtype=torch.float64) * 3)
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(2, C, 3, 2, dtype=torch.float64, requires_grad=True)
    scale = layer.weight / (layer.running_mean_square + 1e-5).sqrt()
    expected = x * scale.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(x)
    inputs = [x, layer.weight, layer.bias]
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)
    )
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    traced = torch.jit.trace(layer, x.detach())
    torch.testing.assert_close(traced(x[:1].detach()), y[:1].detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("converted", [False, True], ids=["autocast-like", "module.half()"])
def test_half_types(dtype, converted):
    """Half in, same half out; statistics and state in float32, also in a half module."""
    half = MABN2d(C, simulated_batch_size=4, batch_size=2, warmup_iters=2, correction_start=3)
    full = copy.deepcopy(half)
    if converted:
        half.to(dtype)
    for _ in range(6):
        x = (torch.randn(2, C, 8, 8) * 300).to(dtype)  # mean squares beyond float16
        dy = torch.randn_like(x)
        a, b = x.clone().requires_grad_(), x.float().requires_grad_()
        y, expected = half(a), full(b)
        assert y.dtype == dtype
        y.backward(dy)
        expected.backward(dy.float())
        assert a.grad is not None and a.grad.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y.float(), expected, rtol=2 * eps, atol=2 * eps)
        assert b.grad is not None
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=2 * eps, atol=2 * eps)
    for (name, buffer), expected in zip(half.named_buffers(), full.buffers(), strict=True):
        assert buffer.dtype == expected.dtype, name
        torch.testing.assert_close(buffer, expected, rtol=1e-5, atol=1e-5)
    half.eval(), full.eval()
    assert half(x).dtype == dtype
    torch.testing.assert_close(half(x).float(), full(x.float()), rtol=2 * eps, atol=2 * eps)


def test_without_affine():
    plain = MABN2d(C, simulated_batch_size=4, batch_size=2, warmup_iters=0, affine=False).double()
    affine, _ = layer_and_reference(2, 0)
    assert not list(plain.parameters())
    for _ in range(4):
        x = torch.randn(2, C, 3, 2, dtype=torch.float64)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        dy = torch.randn_like(x)
        plain(a).backward(dy)
        affine(b).backward(dy)
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(plain.eval()(x), affine.eval()(x))


@pytest.mark.parametrize("x", [torch.randn(2, C), torch.randn(2, C + 1, 2, 2)])
def test_wrong_shapes_change_nothing(x):
    layer = MABN2d(C, batch_size=2)
    with pytest.raises(ValueError, match=r"expects \(N, 3, H, W\)"):
        layer(x)
    assert layer.iterations == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"simulated_batch_size": 32, "batch_size": 3}, "32 is not a multiple of .* 3 "),
        ({"simulated_batch_size": 2, "batch_size": 4}, "2 is not a multiple of .* 4 "),
        ({"batch_size": 0}, "32 is not a multiple of .* 0 "),
        ({"simulated_batch_size": 0}, "simulated_batch_size .* 0"),
        ({"momentum": 0.0}, "momentum .* 0.0"),
        ({"r_max": 0.5}, "r_max .* 0.5"),
        ({"warmup_iters": -1}, "warmup_iters .* -1"),
        ({"eps": 0.0}, "eps .* 0.0"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        MABN2d(C, **options)


def test_batch_size_is_read_off_the_first_input():
    layer = MABN2d(C, simulated_batch_size=8)
    with pytest.raises(ValueError, match="8 is not a multiple of .* 3 "):
        layer(torch.randn(3, C, 2, 2))
    assert layer.iterations == 0 and layer.batch_size is None
    layer(torch.randn(0, C, 2, 2))
    layer(torch.randn(2, C, 2, 2))
    layer(torch.randn(3, C, 2, 2))  # the last batch of an epoch, say
    assert layer.batch_size == 2 and layer.mean_square_ring.values.shape == (4, C)


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


def test_norm_and_activation_in_detectron2s_order():
    norm = nn.GroupNorm(2, 6)
    layer = CenConv2d(4, 6, 3, norm=norm, activation=F.relu)
    assert layer.norm is norm and layer.activation is F.relu
    x = torch.randn(2, 4, 5, 5)
    expected = F.relu(norm(F.conv2d(x, centred(layer.weight), layer.bias)))
    torch.testing.assert_close(layer(x), expected)
    assert set(layer.state_dict()) == {"weight", "bias", "norm.weight", "norm.bias"}
    assert CenConv2d(4, 6, 3).norm is None


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
