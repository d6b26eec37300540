"""Population training beside the forwards it cannot do without, and beside fvcore's."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.comparators.population import PlainPopulation
from benchmarks.contenders import FPN_SIZES, TOY_SIZES, make_levels
from benchmarks.equality import require_equal, tolerance_of
from benchmarks.options import Options, missing
from benchmarks.population_scaling import add_scaling
from benchmarks.result import Result
from benchmarks.timing import Step, alternate
from rethinking_bn.layers import MultiDomainBatchNorm2d
from rethinking_bn.population.estimate import estimate_population_statistics

_OURS = "estimate_population_statistics"
_FORWARD = "forward without gradients"
_FVCORE = "fvcore.update_bn_stats"


def run(options: Options) -> Result:
    """Compare on a ResNet-50 with torch's layers, then on a RetinaNet head with ours."""
    import torchvision

    result = Result("precise-bn")
    name = options.pick(quick="resnet18", cpu="resnet50", cuda="resnet50")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10).train()
    size, images = options.pick(quick=(32, 2), cpu=(128, 2), cuda=(224, 32))
    count = options.pick(quick=2, cpu=20, cuda=20)
    batches: list[Any] = [torch.randn(images, 3, size, size) * (i + 1) for i in range(count)]
    batches = [batch.to(options.device) for batch in batches]
    _compare(result, f"{name}, {images} x {size} x {size}", model, batches, options)
    _compare_head(result, count, options)
    add_scaling(result, options)
    return result


def _compare_head(result: Result, count: int, options: Options) -> None:
    reason = missing("detectron2")
    if reason:
        result.skip("RetinaNet head", reason)
        return
    from benchmarks.retinanet_heads import HeadSize, our_head

    size = options.pick(quick=HeadSize(8, 1, 2, 1), cpu=HeadSize(64, 4, 4, 9), cuda=HeadSize(256))
    sizes = options.pick(quick=TOY_SIZES, cpu=FPN_SIZES[1:] + ((4, 6),), cuda=FPN_SIZES)
    levels = make_levels(sizes, size.channels, device=options.device).xs
    batches = [[x.detach() * (i + 1) for x in levels] for i in range(count)]
    head = our_head(size, 1).to(options.device).train()
    _compare(result, "RetinaNet head, shared BN", head, batches, options)


def _bn_layers(model: nn.Module) -> list[nn.Module]:
    kinds = (nn.BatchNorm2d, MultiDomainBatchNorm2d)
    return [layer for layer in model.modules() if isinstance(layer, kinds)]


def _compare(
    result: Result, case: str, model: nn.Module, batches: Sequence[Any], options: Options
) -> None:
    model.to(options.device)
    count = len(batches)
    models = {name: copy.deepcopy(model) for name in (_OURS, _FORWARD, _FVCORE)}

    def ours() -> None:
        estimate_population_statistics(models[_OURS], batches, count, progress=False)

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                models[_FORWARD](batch)

    sides: dict[str, Step] = {_OURS: ours, _FORWARD: forward}
    usable = isinstance(_bn_layers(model)[0], nn.BatchNorm2d)
    reason = missing("fvcore") if usable else "it does not know layers over several levels"
    if reason:
        result.skip(f"{_FVCORE}, {case}", reason)
    else:
        from fvcore.nn.precise_bn import update_bn_stats

        sides[_FVCORE] = lambda: update_bn_stats(models[_FVCORE], batches, count)
    expected = _plain_population(model, batches)
    logging.getLogger("fvcore").setLevel(logging.WARNING)
    for name in (_OURS, *([] if reason else [_FVCORE])):
        sides[name]()
        _check(result, f"{case}, {name}", models[name], expected, biased=name == _FVCORE)
    times = alternate(sides, options.device, options.plan(8.0))
    images = (
        count * len(batches[0][0])
        if not isinstance(batches[0], Tensor)
        else sum(len(batch) for batch in batches)
    )
    per_image = {name: [value / images for value in values] for name, values in times.items()}
    ours_times = (_OURS, per_image[_OURS])
    result.measure(f"{case}, per image", ours_times, (_FORWARD, per_image[_FORWARD]))
    if _FVCORE in sides:
        result.measure(f"{case}, per image", ours_times, (_FVCORE, per_image[_FVCORE]))


def _plain_population(
    model: nn.Module, batches: Sequence[Any]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return mean, unbiased variance and count that each BN layer should end with."""
    model = copy.deepcopy(model)
    layers = _bn_layers(model)
    plain = PlainPopulation(layers)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    counts = [torch.stack(plain.sums[layer])[:, 0].sum(0) for layer in layers]
    return [
        (*plain.mean_and_variance(layer), count)
        for layer, count in zip(layers, counts, strict=True)
    ]


def _check(
    result: Result,
    what: str,
    model: nn.Module,
    expected: Sequence[tuple[Tensor, Tensor, Tensor]],
    biased: bool,
) -> None:
    errors = []
    for layer, (mean, variance, count) in zip(_bn_layers(model), expected, strict=True):
        wanted = variance * (count - 1) / count if biased else variance
        found: list[Any] = [layer.running_mean, layer.running_var]
        # means are compared in units of the standard deviation: some are zero but for rounding
        spread = wanted.sqrt()
        pairs = ((found[0] / spread, mean / spread), (found[1] / wanted, torch.ones_like(wanted)))
        errors += [require_equal(what, [a], [b], 5 * tolerance_of(torch.float32)) for a, b in pairs]
    result.checks[what] = max(errors)
