"""Population training beside the forwards it cannot do without, and beside fvcore's."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.equality import require_equal, tolerance_of
from benchmarks.result import Result
from benchmarks.timing import Options, Step, alternate, missing
from rethinking_bn.population import estimate_population_statistics

_OURS = "estimate_population_statistics"
_FORWARD = "forward without gradients"
_FVCORE = "fvcore.update_bn_stats"


def run(options: Options) -> Result:
    """Compare on a ResNet-50 with torch's layers."""
    import torchvision

    result = Result("precise-bn")
    name = options.pick(quick="resnet18", cpu="resnet50", cuda="resnet50")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10).train()
    size, images = options.pick(quick=(32, 2), cpu=(128, 2), cuda=(224, 32))
    count = options.pick(quick=2, cpu=20, cuda=20)
    sampled = torch.randn(count, images, 3, size, size).to(options.device)
    batches = [batch * (i + 1) for i, batch in enumerate(sampled)]
    case = f"{name}, {images} x {size} x {size}"
    model.to(options.device)
    models = {name: copy.deepcopy(model) for name in (_OURS, _FORWARD, _FVCORE)}

    def ours() -> None:
        estimate_population_statistics(models[_OURS], batches, len(batches), progress=False)

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                models[_FORWARD](batch)

    sides: dict[str, Step] = {_OURS: ours, _FORWARD: forward}
    if (reason := missing("fvcore")) is not None:
        result.skip(_FVCORE, reason)
    else:
        from fvcore.nn.precise_bn import update_bn_stats

        logging.getLogger("fvcore").setLevel(logging.WARNING)
        sides[_FVCORE] = lambda: update_bn_stats(models[_FVCORE], batches, len(batches))
    expected = _plain_population(model, batches)
    for name in sides.keys() - {_FORWARD}:
        sides[name]()
        _check(result, f"{case}, {name}", models[name], expected, biased=name == _FVCORE)
    times = alternate(sides, options, 12.0)
    ours_times = (_OURS, times[_OURS])
    for other, goal in ((_FORWARD, None), (_FVCORE, 1.1)):
        if other in sides:
            result.measure(case, ours_times, (other, times[other]), unit="s", scale=1.0, goal=goal)
    return result


def _bn_layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


def _plain_population(model: nn.Module, batches: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Return each BN layer's (mean, unbiased variance, count), by plain sums in float64."""
    model = copy.deepcopy(model)
    sums: dict[nn.Module, Tensor | float] = dict.fromkeys(_bn_layers(model), 0.0)

    def add(layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].double().transpose(0, 1).flatten(1)
        sums[layer] += torch.stack([torch.ones_like(x).sum(1), x.sum(1), x.square().sum(1)])

    for layer in sums:
        layer.register_forward_pre_hook(add)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    found: list[tuple[Tensor, ...]] = []
    for layer in sums:
        count, total, squares = torch.as_tensor(sums[layer])
        mean = total / count
        found.append((mean, (squares / count - mean.square()) * count / (count - 1), count))
    return found


def _check(
    result: Result, what: str, model: nn.Module, expected: Sequence[Any], biased: bool
) -> None:
    errors = []
    for layer, (mean, variance, count) in zip(_bn_layers(model), expected, strict=True):
        wanted = variance * (count - 1) / count if biased else variance
        found: list[Any] = [layer.running_mean, layer.running_var]
        # means are compared in units of the standard deviation: some are zero but for rounding
        deviation = wanted.sqrt()
        ours = [found[0] / deviation, found[1] / wanted]
        theirs = [mean / deviation, torch.ones_like(wanted)]
        errors.append(require_equal(what, ours, theirs, 5 * tolerance_of(torch.float32)))
    result.checks[what] = max(errors)
