"""BatchNorm over feature levels in its several forms, all called with a list of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.comparators.batch_norm import ConcatenatedBatchNorm2d, NormPerLevel
from benchmarks.equality import require_equal, require_equal_state
from benchmarks.result import Result
from rethinking_bn.layers import CycleBatchNorm2d, MultiDomainBatchNorm2d

# p3 to p7 of R50-FPN at 800 x 1344, and a toy of them
FPN_SIZES = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
TOY_SIZES = ((8, 12), (4, 6), (2, 3), (2, 2), (1, 2))


@dataclass(frozen=True)
class Levels:
    """Inputs of a layer: L tensors (N, C, H_l, W_l) that need gradients, and output gradients."""

    xs: list[Tensor]
    dys: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs."""
        return sum(x.numel() * x.element_size() for x in self.xs)


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


@dataclass(frozen=True)
class Contender:
    """A module over all levels, with what a training step of it is."""

    name: str
    module: nn.Module
    levels: Levels
    cycle: bool = (
        False  # the module is called once per level, with our bracket around if it is ours
    )

    def forward(self) -> list[Tensor]:
        """Return the outputs, with graph."""
        if not self.cycle:
            return list(self.module(self.levels.xs))
        if isinstance(self.module, CycleBatchNorm2d):
            with self.module.cycle():
                return [self.module(x) for x in self.levels.xs]
        return [self.module(x) for x in self.levels.xs]

    def step(self) -> tuple[list[Tensor], list[Tensor]]:
        """Run forward and backward; return outputs and gradients (inputs, then parameters)."""
        outputs = self.forward()
        dys = [dy.to(y.dtype) for y, dy in zip(outputs, self.levels.dys, strict=True)]
        inputs = [*self.levels.xs, *self.module.parameters()]
        return outputs, list(torch.autograd.grad(outputs, inputs, dys))


def randomize_affine(module: nn.Module) -> None:
    """Give a layer's weights and biases seeded values, so that nothing hides behind ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)


def multi_domain(name: str, levels: Levels, **choices: str) -> Contender:
    """Return MultiDomainBatchNorm2d with the given choices."""
    x = levels.xs[0]
    module = MultiDomainBatchNorm2d(
        x.shape[1],
        len(levels.xs),
        train_stats=choices.get("train_stats", "shared"),  # type: ignore[arg-type]
        population_stats=choices.get("population_stats", "shared"),  # type: ignore[arg-type]
        affine=choices.get("affine", "shared"),  # type: ignore[arg-type]
        device=x.device,
    )
    randomize_affine(module)
    return Contender(name, module, levels)


def concatenated(levels: Levels) -> Contender:
    """Return concatenate, nn.BatchNorm2d, split."""
    x = levels.xs[0]
    return Contender("concatenate/split", ConcatenatedBatchNorm2d(x.shape[1]).to(x.device), levels)


def per_level(name: str, levels: Levels, make: Callable[[int], nn.Module]) -> Contender:
    """Return one layer per level, each made from C."""
    x = levels.xs[0]
    return Contender(name, NormPerLevel(make(x.shape[1]) for _ in levels.xs).to(x.device), levels)


def check_step(result: Result, ours: Contender, other: Contender, tolerance: float) -> None:
    """Give both sides one state, run a step of each, and compare everything it leaves.

    Raises:
        ResultsDiffer: when outputs, gradients or running statistics differ.
    """
    other.module.load_state_dict(ours.module.state_dict())
    steps = [side.step() for side in (ours, other)]
    pair = f"{ours.name} = {other.name}"
    for index, what in enumerate(("outputs", "gradients")):
        what = f"{pair}, {what}"
        result.checks[what] = require_equal(what, steps[0][index], steps[1][index], tolerance)
    what, states = f"{pair}, state", [side.module.state_dict() for side in (ours, other)]
    result.checks[what] = require_equal_state(what, states[0], states[1], tolerance)
