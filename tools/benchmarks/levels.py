"""BatchNorm over feature levels in its several forms, all called with a list of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.equality import require_equal, require_equal_state, tolerance_of
from benchmarks.result import Result
from rethinking_bn.layers import MultiDomainBatchNorm2d
from rethinking_bn.layers.multi_domain import TABLE_5

# p3 to p7 of R50-FPN at 800 x 1344 and at half of that, and a toy of them
FULL_SIZES = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
HALF_SIZES = ((50, 84), (25, 42), (13, 21), (7, 11), (4, 6))
TOY_SIZES = ((8, 12), (4, 6), (2, 3), (2, 2), (1, 2))


@dataclass(frozen=True)
class Levels:
    """Inputs of a layer: L tensors (N, C, H_l, W_l) that need gradients, and output gradients."""

    xs: list[Tensor]
    dys: list[Tensor]


def make_levels(
    sizes: Sequence[tuple[int, int]],
    channels: int,
    *,
    images: int = 2,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    device: torch.device | None = None,
) -> Levels:
    """Return seeded levels whose statistics differ, as those of an FPN do."""
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    tensors: list[Tensor] = []
    for level, size in enumerate([*sizes, *sizes]):
        x = torch.randn(images, channels, *size, generator=generator)
        x = x * (1 + level / 4) + level / 4 if level < len(sizes) else x
        x = x.to(dtype=dtype, device=device, memory_format=memory_format)
        tensors.append(x.requires_grad_(level < len(sizes)))
    return Levels(tensors[: len(sizes)], tensors[len(sizes) :])


class ConcatenatedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d on all levels copied into one tensor, which is then split again."""

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:  # type: ignore[override]
        flat = torch.cat([x.flatten(2) for x in xs], dim=2).unsqueeze(3)
        parts = super().forward(flat).split([x[0, 0].numel() for x in xs], dim=2)
        return [part.reshape(x.shape) for part, x in zip(parts, xs, strict=True)]


class PlainBatchNorm2d(nn.BatchNorm2d):
    """Statistics shared by the levels, in a dozen plain lines for the compiler."""

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:  # type: ignore[override]
        counts = [x.shape[0] * x.shape[2] * x.shape[3] for x in xs]
        moments = [torch.var_mean(x.float(), (0, 2, 3), correction=0) for x in xs]
        total = sum(counts)
        shares = [n / total for n in counts]
        mean = torch.stack([s * m for s, (_, m) in zip(shares, moments, strict=True)]).sum(0)
        spreads = [v + (m - mean).square() for v, m in moments]
        var = torch.stack([s * d for s, d in zip(shares, spreads, strict=True)]).sum(0)
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None
            self.running_mean.lerp_(mean, self.momentum or 0.0)
            self.running_var.lerp_(var * total / (total - 1), self.momentum or 0.0)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return [(x * scale[:, None, None] + shift[:, None, None]).to(x.dtype) for x in xs]


class NormPerLevel(nn.ModuleList):
    """A norm layer of its own for every level."""

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self, xs, strict=True)]


@dataclass(frozen=True)
class Contender:
    """A module over all levels (with ``cycle``, called once per level), and its training step."""

    name: str
    module: nn.Module
    levels: Levels
    cycle: bool = False

    def forward(self) -> list[Tensor]:
        """Return the outputs, with graph."""
        xs = self.levels.xs
        return [self.module(x) for x in xs] if self.cycle else list(self.module(xs))

    def step(self) -> tuple[list[Tensor], list[Tensor]]:
        """Run forward and backward; return outputs and gradients (inputs, then parameters)."""
        outputs = self.forward()
        inputs = [*self.levels.xs, *self.module.parameters()]
        return outputs, list(torch.autograd.grad(outputs, inputs, self.levels.dys))


def contender(
    name: str, levels: Levels, make: Callable[[int], nn.Module], **options: Any
) -> Contender:
    """Return a module made from C, its affine seeded so that nothing hides behind ones."""
    x = levels.xs[0]
    module = make(x.shape[1]).to(x.device)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return Contender(name, module, levels, **options)


def row(number: int, levels: Levels) -> Contender:
    """Return MultiDomainBatchNorm2d with the choices of a row of Table 5."""
    count, choices = len(levels.xs), dict[str, Any](TABLE_5[number])
    return contender(f"row {number}", levels, lambda c: MultiDomainBatchNorm2d(c, count, **choices))


def per_level(name: str, levels: Levels, make: Callable[[int], nn.Module]) -> Contender:
    """Return one layer per level, each made from C."""
    return contender(name, levels, lambda c: NormPerLevel(make(c) for _ in levels.xs))


def check_step(result: Result, ours: Contender, other: Contender) -> None:
    """Give both sides one state, run a step of each, and compare everything it leaves.

    Raises:
        ResultsDiffer: when outputs, gradients or running statistics differ.
    """
    tolerance = tolerance_of(ours.levels.xs[0].dtype)
    other.module.load_state_dict(ours.module.state_dict())
    steps = [side.step() for side in (ours, other)]
    pair = f"{ours.name} = {other.name}"
    for index, what in enumerate(("outputs", "gradients")):
        what = f"{pair}, {what}"
        result.checks[what] = require_equal(what, steps[0][index], steps[1][index], tolerance)
    what, states = f"{pair}, state", [side.module.state_dict() for side in (ours, other)]
    result.checks[what] = require_equal_state(what, states[0], states[1], tolerance)
