"""Moving average batch normalisation written out from its formulas, independent of the package."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Reference:
    """One layer's history; ``step`` is one training iteration, forward and backward."""

    m: int
    warmup: int
    correction_start: int = 1000
    momentum: float = 0.02
    r_max: float = 5.0
    eps: float = 1e-5
    R: Tensor | None = None
    s: list[Tensor] = field(default_factory=list)
    p: list[Tensor] = field(default_factory=list)
    visited: set[str] = field(default_factory=set)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        self.x, self.weight = x, weight
        t = len(self.s) + 1
        self.s.append((x * x).mean((0, 2, 3)))
        if t <= self.m or t < self.warmup:
            self.moving = False
            S = self.s[-1]
        else:
            self.moving = True
            S = torch.stack(self.s[-self.m :]).mean(0)
        R = torch.ones_like(S) if self.R is None else self.R
        r = torch.sqrt(S + self.eps) / torch.sqrt(R + self.eps)
        if t <= max(self.correction_start, self.warmup):
            r = torch.ones_like(r)
        else:
            for value in r.tolist():
                too_low, too_high = value < 1 / self.r_max, value > self.r_max
                self.visited.add("low" if too_low else "high" if too_high else "inside")
            r = r.clamp(1 / self.r_max, self.r_max)
        self.visited.add("moving" if self.moving else "own")
        self.R = (1 - self.momentum) * R + self.momentum * S
        self.sigma, self.r = _spread(torch.sqrt(S + self.eps)), _spread(r)
        self.z = x / self.sigma
        return _spread(weight) * (self.r * self.z) + _spread(bias)

    def backward(self, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g = dy * _spread(self.weight) * self.r
        self.p.append((g * self.z).mean((0, 2, 3)))
        P = torch.stack(self.p[-self.m :]).mean(0) if self.moving else self.p[-1]
        dx = (g - self.z * _spread(P)) / self.sigma
        return dx, (dy * self.r * self.z).sum((0, 2, 3)), dy.sum((0, 2, 3))


def _spread(channels: Tensor) -> Tensor:
    return channels.view(1, -1, 1, 1)
