"""The operators of a layer's formulas one after the other: what its host time cannot go below.

No module, no check, no choice, one ``autograd.Function`` whose state is a few tensors. Each
operator runs code of its own, as it does in the layer: the same one again would be found in a
cache, and cost a third.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import Contender, Levels
from rethinking_bn.numerics.channel_ops import combine_each, gradient_sums, scale_and_shift

_EPS = 1e-5
Tensors = tuple[Tensor, ...]


class _Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Any, weight: Tensor, bias: Tensor, *xs: Tensor) -> Tensors:
        ctx.save_for_backward(weight, *xs)
        ctx.layer, (ys, ctx.kept) = layer, layer.there(weight, bias, xs)
        return ys

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        weight, *xs = ctx.saved_tensors
        return None, *ctx.layer.back(ctx.kept, weight, xs, dys)


class _Layer(nn.Module):
    mean: Tensor
    variance: Tensor
    zero: Tensor
    ring: Tensor
    count: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        zeros, ones = torch.zeros(2, channels), torch.ones(5, channels)
        count = torch.zeros((), dtype=torch.long)
        buffers = {"mean": zeros[0], "zero": zeros[1], "variance": ones[0], "ring": ones[1:]}
        for name, value in {**buffers, "count": count}.items():
            self.register_buffer(name, value)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return list(_Bare.apply(self, self.weight, self.bias, *xs))


class _Row1(_Layer):
    def there(self, weight: Tensor, bias: Tensor, xs: Tensors) -> tuple[Tensors, Any]:
        pairs = [torch.batch_norm_update_stats(x, None, None, 0.0) for x in xs]
        values = torch.stack([v for pair in zip(*pairs, strict=True) for v in pair])
        means, variances = values.view(2, len(xs), -1).unbind()
        centred = means - means[0]
        shift = (centred * 0.2).sum(0)
        variance = (torch.addcmul(variances, centred, centred.sub_(shift)) * 0.2).sum(0)
        mean = means[0] + shift
        for buffer, value in ((self.mean, mean), (self.variance, variance * 1.01)):
            torch.where(variance.max() < math.inf, buffer.lerp(value, 0.1), buffer, out=buffer)
        self.count.add_(1)
        invstd = (variance + _EPS).rsqrt()
        scale = invstd * weight
        offset = torch.addcmul(bias, mean, scale, value=-1)
        return scale_and_shift(xs, scale[None], offset[None]), (mean, variance, invstd, scale)

    def back(self, kept: Any, weight: Tensor, xs: list[Tensor], dys: Tensors) -> Any:
        mean, variance, invstd, scale = kept
        pairs = [gradient_sums(dy, x, mean, variance, _EPS) for dy, x in zip(dys, xs, strict=True)]
        total = torch.stack([v for pair in pairs for v in pair]).view(len(xs), 2, -1).sum(0)
        scaled = total * (scale * -0.01)
        b = scaled[1] * invstd
        c = torch.addcmul(scaled[0], b, mean, value=-1)
        dxs = combine_each(dys, xs, scale[None], b[None], c[None], [True] * len(xs), True)
        return total[1], total[0], *dxs


class _Mabn(_Layer):
    def there(self, weight: Tensor, bias: Tensor, xs: Tensors) -> tuple[Tensors, Any]:
        (_, own), running = gradient_sums(xs[0], xs[0], self.zero, self.zero, 1e4), self.variance
        torch.where(own < math.inf, own, self.ring[0], out=self.ring[1])
        spread = self.ring.mean(0) + _EPS
        r = (spread / (running + _EPS)).sqrt_().clamp_(0.2, 5.0)
        moved = running.lerp(spread, 0.02)
        torch.where(moved < math.inf, moved, running, out=running)
        self.count.add_(1)
        scale = weight * r
        a = spread.rsqrt().mul_(scale)
        return scale_and_shift(xs, a[None], bias[None]), (spread, r, scale, a)

    def back(self, kept: Any, weight: Tensor, xs: list[Tensor], dys: Tensors) -> Any:
        spread, r, scale, a = kept
        sum_dy, sum_dy_z = gradient_sums(dys[0], xs[0], self.zero, spread, 0.0)
        p = torch.addcmul(self.zero, scale, sum_dy_z, value=0.01)
        rest = p - p
        torch.where(rest == rest, p, self.ring[2], out=self.ring[3])
        self.count.add_(1)
        b = torch.addcdiv(self.zero, self.ring.mean(0), spread, value=-1)
        dxs = combine_each(dys, xs, a[None], b[None], self.zero[None], [True], True)
        return sum_dy_z * r, sum_dy, *dxs


class _Written(_Layer):
    """What row 1's kernels write."""

    def there(self, weight: Tensor, bias: Tensor, xs: Tensors) -> tuple[Tensors, Any]:
        kept = (xs[0].new_empty((4, 1, len(weight))), xs[0].new_empty((5, 4, len(weight))))
        return tuple([torch.empty_like(x) for x in xs]), kept

    def back(self, kept: Any, weight: Tensor, xs: list[Tensor], dys: Tensors) -> Any:
        kept[0].new_empty((5, 2, len(weight)))
        of_affine = torch.empty_like(weight), torch.empty_like(weight)
        return *of_affine, *[torch.empty_like(x) for x in xs]


def floors(levels: Levels, first: Levels) -> tuple[Contender, Contender, Contender]:
    """Return row 1's formulas over all levels, MABN's over the first, and row 1 by kernels."""
    kinds: tuple[tuple[str, Callable[[int], nn.Module], Levels], ...] = (
        ("row 1's operators alone", _Row1, levels),
        ("MABN2d's operators alone", _Mabn, first),
        ("row 1's tensors alone", _Written, levels),
    )
    x = levels.xs[0]
    row1, mabn, written = (Contender(n, kind(x.shape[1]).to(x.device), on) for n, kind, on in kinds)
    return row1, mabn, written
