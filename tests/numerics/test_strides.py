"""Inputs of any stride, with gradients of any stride, in every type."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rethinking_bn.layers import BatchNorm2d, MultiDomainBatchNorm2d
from tests import reference
from tests.layers.kinds import affine_of, kinds, run
from tests.reference import CHANNELS

SHAPES = [(9, 7), (5, 4), (2, 3), (1, 2)]


def strided(x: Tensor) -> Tensor:
    whole = x.new_zeros(x.shape[0], CHANNELS, 2 * x.shape[2], x.shape[3] + 3)
    whole[:, :, ::2, 1:-2] = x
    return whole[:, :, ::2, 1:-2]


def permuted(x: Tensor) -> Tensor:
    return x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)


def some_channels_last_channels(x: Tensor) -> Tensor:
    whole = x.repeat(1, 2, 1, 1).to(memory_format=torch.channels_last)
    return whole[:, CHANNELS:]


def expanded(x: Tensor) -> Tensor:
    return x[:, :, :1, :1].expand_as(x)


@pytest.mark.parametrize("view", [strided, permuted, some_channels_last_channels, expanded])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-9),
        (torch.float32, 1e-4),
        (torch.bfloat16, 3e-2),
        (torch.float16, 5e-3),
    ],
)
@pytest.mark.parametrize("shared", [True, False])
def test_equals_the_reference(
    view: Callable[[Tensor], Tensor], dtype: torch.dtype, tolerance: float, shared: bool
) -> None:
    if view is expanded:
        # Two distinct values per channel: the gradient is what nearly cancelling terms leave, and
        # nn.BatchNorm2d's own is off by up to 1.8e-4.
        tolerance *= 2
    choice = "shared" if shared else "domain_specific"
    layer = MultiDomainBatchNorm2d(CHANNELS, len(SHAPES), train_stats=choice, affine=choice)
    for i, parameter in enumerate(layer.parameters()):
        torch.nn.init.constant_(parameter, 0.5 + 0.1 * i)
    xs = [view(x.to(dtype)) for x in reference.levels(shapes=SHAPES)]
    xs[1] = xs[1].contiguous()  # formats may differ between levels
    mine = [x.detach().requires_grad_() for x in xs]
    theirs = [x.double().requires_grad_() for x in xs]
    assert not any(x.is_contiguous() for x in (mine[0], mine[2]))
    ys = layer(mine)
    expected: list[Tensor] = []
    for i, x in enumerate(theirs):
        affine = (value.double() for value in affine_of(layer, i))
        expected += reference.normalize([x], theirs if shared else [x], *affine)
    dys = [view(torch.randn_like(x)).to(dtype) for x in xs]
    torch.autograd.backward(ys, dys)
    torch.autograd.backward(expected, [dy.double() for dy in dys])
    for y, z, x, v in zip(ys, expected, mine, theirs, strict=True):
        assert y.dtype == dtype and x.grad.dtype == dtype
        for got, want in ((y, z), (x.grad, v.grad)):
            scale = max(1.0, want.abs().max().item())
            torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * scale)


def two_layouts(shape: tuple[int, ...]) -> list[Tensor]:
    """Return inputs whose strides are contiguous, channels-last, or both at once."""
    n, c, h, w = shape
    x = torch.randn(shape)
    last = x.to(memory_format=torch.channels_last)
    strides = {(c * h * w, 1, s, t) for s in (1, w * c, 7) for t in (1, c, 9)}
    odd = [
        torch.as_strided(last, shape, (a, b, s if h == 1 else w * c, t if w == 1 else c))
        for a, b, s, t in sorted(strides)
    ]
    return [x, last, *odd]


ROW_1, ROW_4 = "shared/shared/shared", "domain_specific/domain_specific/shared"
LAYERS = {kind: kinds(8, 2)[kind] for kind in ("BN", "cycle", ROW_1, ROW_4)}
LAYERS["inference"] = lambda: BatchNorm2d(8).eval()


@pytest.mark.parametrize("shape", [(2, 8, 5, 1), (2, 8, 1, 5), (1, 8, 4, 3), (2, 8, 1, 1)], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_strides_that_are_two_layouts_at_once(kind: str, shape: tuple[int, ...]) -> None:
    """Defect 38: torch's CPU operator then mixes up elements of the input and of the gradient."""
    layer, wide = LAYERS[kind](), LAYERS[kind]().double()

    def gradients(net: torch.nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        assert leaf.stride() == x.stride()
        outputs = run(net, [leaf, leaf.detach() + 1])
        return list(torch.autograd.grad(outputs[0], [leaf, *list(net.parameters())[:2]], dy))

    for x in two_layouts(shape):
        for dy in two_layouts(shape):
            got = gradients(layer, x, dy)
            want = gradients(wide, x.double().contiguous(), dy.double().contiguous())
            torch.testing.assert_close([g.double() for g in got], want, rtol=1e-4, atol=1e-4)
