"""Moving average batch normalisation by its formulas, an operator for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class EagerMABN2d(nn.Module):
    """MABN (Yan et al., ICLR 2020, arXiv 2001.06838) as one would write it down.

    Args:
        num_features: C.
        window: m, the iterations that are averaged.
        warmup: iterations before that.
        correction_start: iterations with r = 1.

    Shape:
        (N, C, H, W) -> (N, C, H, W).
    """

    running_mean_square: Tensor

    def __init__(
        self,
        num_features: int,
        window: int,
        warmup: int,
        correction_start: int,
        momentum: float = 0.02,
        r_max: float = 5.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.window, self.warmup, self.correction_start = window, warmup, correction_start
        self.momentum, self.r_max, self.eps = momentum, r_max, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean_square", torch.ones(num_features))
        self.iteration = 0
        self.forward_window: list[Tensor] = []
        self.backward_window: list[Tensor] = []

    @property
    def moving(self) -> bool:
        """Whether moving averages are in use at this iteration."""
        return self.iteration > self.window and self.iteration >= self.warmup

    def average(self, window: list[Tensor], value: Tensor) -> Tensor:
        """Take a value into one of the windows; return what stands for it."""
        window.append(value)
        del window[: -self.window]
        return torch.stack(window).mean(0) if self.moving else value

    def forward(self, x: Tensor) -> Tensor:
        self.iteration += 1
        with torch.no_grad():
            smoothed = self.average(self.forward_window, x.square().mean((0, 2, 3)))
            running = self.running_mean_square
            r = (smoothed + self.eps).sqrt() / (running + self.eps).sqrt()
            if self.iteration <= max(self.correction_start, self.warmup):
                r = torch.ones_like(r)
            r = r.clamp(1 / self.r_max, self.r_max)
            running.copy_((1 - self.momentum) * running + self.momentum * smoothed)
        y: Tensor = _Eager.apply(x, self.weight, self.bias, smoothed, r, self)
        return y


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        smoothed: Tensor,
        r: Tensor,
        layer: EagerMABN2d,
    ) -> Tensor:
        scale = (smoothed + layer.eps).sqrt().view(1, -1, 1, 1)
        z = x / scale
        ctx.save_for_backward(z, weight, scale, r)
        ctx.layer = layer
        rz = r.view(1, -1, 1, 1) * z
        return weight.view(1, -1, 1, 1) * rz + bias.view(1, -1, 1, 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, scale, r = ctx.saved_tensors
        layer: EagerMABN2d = ctx.layer
        g = dy * (weight * r).view(1, -1, 1, 1)
        p = layer.average(layer.backward_window, (g * z).mean((0, 2, 3)))
        dx = (g - z * p.view(1, -1, 1, 1)) / scale
        dweight = (dy * r.view(1, -1, 1, 1) * z).sum((0, 2, 3))
        return dx, dweight, dy.sum((0, 2, 3)), None, None, None
