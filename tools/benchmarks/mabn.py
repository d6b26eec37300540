"""MABN's forward and backward beside its formulas in eager mode and nn.BatchNorm2d."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.comparators.mabn import EagerMABN2d
from benchmarks.equality import require_equal, tolerance_of
from benchmarks.floor import floor_table
from benchmarks.options import Options
from benchmarks.result import Result
from benchmarks.timing import Step, alternate, spread
from rethinking_bn.layers.mabn.layer import MABN2d

Shape = tuple[int, int, int, int]

_IMAGES = 2
_WINDOW = 4  # m, so that a short check reaches the moving averages; 16 in training, at equal cost
_WARMUP = 5
_CORRECTION_START = 7
_CHECKED = 10  # iterations: warm-up, moving averages without and with correction


def run(options: Options) -> Result:
    """Compare at the shapes of two layers of a Mask R-CNN backbone, batch 2, float32."""
    result = Result("mabn")
    full: tuple[Shape, ...] = ((_IMAGES, 256, 50, 84), (_IMAGES, 64, 200, 336))
    shapes = options.pick(quick=((_IMAGES, 8, 5, 6),), cpu=full, cuda=full)
    for shape in shapes:
        _compare(result, shape, options)
    return result


def _compare(result: Result, shape: Shape, options: Options) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to(options.device) for _ in range(2))
    x.requires_grad_()
    channels = shape[1]
    ours = MABN2d(
        channels,
        simulated_batch_size=_WINDOW * _IMAGES,
        batch_size=_IMAGES,
        warmup_iters=_WARMUP,
        correction_start=_CORRECTION_START,
    ).to(options.device)
    eager = EagerMABN2d(channels, _WINDOW, _WARMUP, _CORRECTION_START).to(options.device)
    case = f"{shape}"
    _check(result, case, ours, eager, x, dy)
    modules: dict[str, nn.Module] = {
        "MABN2d": ours,
        "eager formulas": eager,
        "nn.BatchNorm2d": nn.BatchNorm2d(channels).to(options.device),
    }
    steps = {name: _stepper(module, x, dy) for name, module in modules.items()}
    times = alternate(steps, options.device, options.plan(7.0))
    for other in ("eager formulas", "nn.BatchNorm2d"):
        result.measure(case, ("MABN2d", times["MABN2d"]), (other, times[other]))
    measured = {name: spread(values) for name, values in times.items()}
    nbytes = x.numel() * x.element_size()
    result.tables.append(floor_table(nbytes, measured, options.device, options.plan(1.0)))


def _stepper(module: nn.Module, x: Tensor, dy: Tensor) -> Step:
    return lambda: _step(module, x, dy)


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
