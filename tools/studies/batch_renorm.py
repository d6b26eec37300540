"""Batch Renormalization (Ioffe, 2017), for comparison in `small-batch`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_MOMENTUM = 0.1  # of moving statistics, as BN's


class BatchRenorm2d(nn.BatchNorm2d):
    """Batch Renormalization, a reference: BN corrected towards the moving statistics in training.

    y = (x - mean) / std · r + d with r = std / running_std in [1 / r_max, r_max] and d = (mean -
    running_mean) / running_std in [-d_max, d_max], both constants in the backward; r = 1 and
    d = 0 for the first ``warmup`` steps.
    """

    def __init__(self, num_features: int, *, warmup: int, r_max: float, d_max: float) -> None:
        super().__init__(num_features, momentum=_MOMENTUM)
        self.warmup, self.r_max, self.d_max, self.calls = warmup, r_max, d_max, 0

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.calls < self.warmup:
            self.calls += self.training
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None
        with torch.no_grad():
            var, mean = torch.var_mean(input, (0, 2, 3), correction=0)
            running_std = (self.running_var + self.eps).sqrt()
            r = ((var + self.eps).sqrt() / running_std).clamp(1 / self.r_max, self.r_max)
            d = ((mean - self.running_mean) / running_std).clamp(-self.d_max, self.d_max)
        x = nn.functional.batch_norm(
            input, self.running_mean, self.running_var, None, None, True, _MOMENTUM, self.eps
        )
        scale, shift = r * self.weight, d * self.weight + self.bias
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
