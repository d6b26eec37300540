"""BatchNorm over feature levels by concatenation, and synchronised one level at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ConcatenatedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d on all levels copied into one tensor, which is then split again.

    Shape:
        list of L tensors (N, C, H_l, W_l) -> list of L tensors of the same shapes.
    """

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:  # type: ignore[override]
        flat = torch.cat([x.flatten(2) for x in xs], dim=2).unsqueeze(3)
        parts = super().forward(flat).split([x[0, 0].numel() for x in xs], dim=2)
        return [part.reshape(x.shape) for part, x in zip(parts, xs, strict=True)]


class NormPerLevel(nn.ModuleList):
    """A norm layer of its own for every level.

    Shape:
        list of L tensors -> list of L tensors.
    """

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self, xs, strict=True)]


class PlainSyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm pooled over ranks as nn.SyncBatchNorm does it, which itself refuses CPU tensors.

    One all_gather in the forward and one all_reduce in the backward of every call.
    """

    def forward(self, input: Tensor) -> Tensor:
        y, mean, var, count = _PlainSync.apply(input, self.eps)
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                unbiased = var * count / (count - 1).clamp(min=1)
                self.running_mean.lerp_(mean, self.momentum or 0.0)
                self.running_var.lerp_(unbiased, self.momentum or 0.0)
        if self.affine:
            y = y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return y


class _PlainSync(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        count = x.new_tensor([x.numel() / x.shape[1]])
        mine = torch.cat([count, mean, var])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        counts, means, variances = torch.stack(everyone).split([1, len(mean), len(mean)], dim=1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        var = (counts * (variances + (means - mean).square())).sum(0) / total
        invstd = (var + eps).rsqrt()
        normalized = (x - mean.view(1, -1, 1, 1)) * invstd.view(1, -1, 1, 1)
        ctx.save_for_backward(normalized, invstd, total)
        ctx.mark_non_differentiable(mean, var, total)
        return normalized, mean, var, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *unused: Any) -> tuple[Tensor, None]:
        normalized, invstd, total = ctx.saved_tensors
        sums = torch.stack([dy.sum((0, 2, 3)), (dy * normalized).sum((0, 2, 3))])
        dist.all_reduce(sums)
        first, second = (sums / total).view(2, 1, -1, 1, 1)
        return (dy - first - normalized * second) * invstd.view(1, -1, 1, 1), None
