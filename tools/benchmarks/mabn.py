"""MABN's forward and backward beside its formulas in eager mode and nn.BatchNorm2d."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.equality import require_equal, tolerance_of
from benchmarks.result import Result
from benchmarks.timing import Options, alternate
from rethinking_bn.layers import MABN2d

_IMAGES = 2
_WINDOW = 4  # m, so that a short check reaches the moving averages; 16 in training, at equal cost
_WARMUP, _CORRECTION_START = 5, 7  # iterations
_CHECKED = 10  # iterations: warm-up, moving averages without and with correction
_MOMENTUM, _R_MAX, _EPS = 0.02, 5.0, 1e-5


class EagerMABN2d(nn.Module):
    """MABN (Yan et al., ICLR 2020, arXiv 2001.06838) as one would write it down."""

    running_mean_square: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean_square", torch.ones(num_features))
        self.iteration = 0
        self.forward_window: list[Tensor] = []
        self.backward_window: list[Tensor] = []

    def average(self, window: list[Tensor], value: Tensor) -> Tensor:
        """Take a value into one of the windows; return what stands for it."""
        window.append(value)
        del window[:-_WINDOW]
        moving = self.iteration > _WINDOW and self.iteration >= _WARMUP
        return torch.stack(window).mean(0) if moving else value

    def forward(self, x: Tensor) -> Tensor:
        self.iteration += 1
        with torch.no_grad():
            smoothed = self.average(self.forward_window, x.square().mean((0, 2, 3)))
            running = self.running_mean_square
            r = (smoothed + _EPS).sqrt() / (running + _EPS).sqrt()
            if self.iteration <= max(_CORRECTION_START, _WARMUP):
                r = torch.ones_like(r)
            r = r.clamp(1 / _R_MAX, _R_MAX)
            running.copy_((1 - _MOMENTUM) * running + _MOMENTUM * smoothed)
        y: Tensor = _Eager.apply(x, self.weight, self.bias, smoothed, r, self)
        return y


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, smoothed, r, ctx.layer = inputs
        scale = (smoothed + _EPS).sqrt().view(1, -1, 1, 1)
        z = x / scale
        ctx.save_for_backward(z, weight, scale, r)
        rz = r.view(1, -1, 1, 1) * z
        return weight.view(1, -1, 1, 1) * rz + bias.view(1, -1, 1, 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, scale, r = ctx.saved_tensors
        layer = ctx.layer
        g = dy * (weight * r).view(1, -1, 1, 1)
        p = layer.average(layer.backward_window, (g * z).mean((0, 2, 3)))
        dx = (g - z * p.view(1, -1, 1, 1)) / scale
        dweight = (dy * r.view(1, -1, 1, 1) * z).sum((0, 2, 3))
        return dx, dweight, dy.sum((0, 2, 3)), None, None, None


def run(options: Options) -> Result:
    """Compare at the shapes of two layers of a Mask R-CNN backbone, batch 2, float32."""
    result = Result("mabn")
    full = ((256, 50, 84), (64, 200, 336))
    for shape in options.pick(quick=((8, 5, 6),), cpu=full, cuda=full):
        _compare(result, (_IMAGES, *shape), options)
    return result


def _compare(result: Result, shape: Sequence[int], options: Options) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to(options.device) for _ in range(2))
    x.requires_grad_()
    channels = shape[1]
    sizes: Any = {"simulated_batch_size": _WINDOW * _IMAGES, "batch_size": _IMAGES}
    phases: Any = {"warmup_iters": _WARMUP, "correction_start": _CORRECTION_START}
    ours = MABN2d(channels, **sizes, **phases).to(options.device)
    eager = EagerMABN2d(channels).to(options.device)
    case = f"{shape}"
    _check(result, case, ours, eager, x, dy)
    modules: dict[str, nn.Module] = {
        "MABN2d": ours,
        "eager formulas": eager,
        "nn.BatchNorm2d": nn.BatchNorm2d(channels).to(options.device),
    }
    steps = {name: partial(_step, module, x, dy) for name, module in modules.items()}
    times = alternate(steps, options, 7.0)
    for other in ("eager formulas", "nn.BatchNorm2d"):
        result.measure(case, ("MABN2d", times["MABN2d"]), (other, times[other]))


def _step(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    y = module(x)
    return y, torch.autograd.grad(y, [x, *module.parameters()], dy)


def _check(
    result: Result, case: str, ours: MABN2d, eager: EagerMABN2d, x: Tensor, dy: Tensor
) -> None:
    """Run both through all phases on inputs whose size varies; compare every iteration."""
    tolerance = tolerance_of(torch.float32)
    for iteration in range(1, _CHECKED + 1):
        factor = 1 + 0.5 * (iteration % 3)
        scaled = (x.detach() * factor).requires_grad_()
        steps = [_step(module, scaled, dy * factor) for module in (ours, eager)]
        what = f"{case}, iteration {iteration}"
        errors = [
            require_equal(f"{what}, outputs", [steps[0][0]], [steps[1][0]], tolerance),
            require_equal(f"{what}, gradients", steps[0][1], steps[1][1], tolerance),
        ]
        result.checks[what] = max(errors)
    what = f"{case}, running mean square"
    mine, others = [ours.running_mean_square], [eager.running_mean_square]
    result.checks[what] = require_equal(what, mine, others, tolerance)
