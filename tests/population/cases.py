"""What the tests of population training share: a written-out reference, models and a snapshot."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def seen_statistics(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of every value per channel, by one look at all of them."""
    values = torch.cat([x.double().transpose(0, 1).flatten(1) for x in inputs], dim=1)
    return values.mean(1), values.var(1)


def assert_statistics(
    layer: Any, inputs: list[Tensor], *, rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    """Compare a layer's population statistics with those of everything it saw."""
    mean, var = seen_statistics(inputs)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=rtol, atol=atol)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=rtol, atol=atol)


def small_net(**kwargs: Any) -> Any:
    """Three BN layers, convolutions and dropout (module 4)."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm2d(3, **kwargs),
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5, **kwargs),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(5, 4, 1),
        nn.BatchNorm2d(4, **kwargs),
    )


def images(*sizes: int, seed: int = 1) -> list[Tensor]:
    """One batch (n, 3, 6, 4 + n) per given n, each with other moments."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, 3, 6, 4 + n, generator=generator) * (1 + i) + 3 * i
        for i, n in enumerate(sizes)
    ]


class Snapshot:
    """Everything of a model that a failed or finished run must leave as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.taken = self._take()

    def _take(self) -> dict[str, Any]:
        modules, plain = list(self.model.modules()), (int, float, str, type(None))
        return {
            "values": [b.clone() for b in self.model.buffers()],
            "parameters": [(p.tolist(), p.grad is None) for p in self.model.parameters()],
            "identities": [(name, id(b)) for name, b in self.model.named_buffers()],
            "attributes": [
                {k: v for k, v in vars(module).items() if isinstance(v, plain)}
                for module in modules
            ],
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],
            "random": (
                random.getstate(),
                [x.tolist() if hasattr(x, "tolist") else x for x in np.random.get_state()],
                torch.get_rng_state().tolist(),
            ),
        }

    def assert_unchanged(self, *, buffers: bool = True) -> None:
        now = self._take()
        if buffers:
            for old, new in zip(self.taken["values"], now["values"], strict=True):
                torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
        for key in ("parameters", "identities", "attributes", "hooks", "random"):
            assert now[key] == self.taken[key], key


def each_level(norm: nn.Module, levels: list[Tensor]) -> list[Tensor]:
    """Call a layer once per level, as a detection head does."""
    return [norm(x) for x in levels]


class FirstHalf(nn.BatchNorm2d):
    """A main BatchNorm for the first half of a batch, another one for the second."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.second = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        first, second = x.chunk(2)
        return torch.cat([super().forward(first), self.second(second)])


class Masked(nn.BatchNorm1d):
    """Statistics of the positions that are no padding; it assigns its buffers anew."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        assert mean is not None and var is not None
        if self.training:
            count = mask.sum()
            mean = (x * mask).sum((0, 2)) / count
            var = ((x - mean[:, None]).square() * mask).sum((0, 2)) / count
            self.running_mean = self.running_mean + self.momentum * (mean - self.running_mean)
            unbiased = var * count / (count - 1)
            self.running_var = self.running_var + self.momentum * (unbiased - self.running_var)
        return (x - mean[:, None]) / (var[:, None] + self.eps).sqrt() * mask
