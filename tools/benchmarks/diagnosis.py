"""A diagnosis of ResNet-50 beside population training on the same batches."""

from __future__ import annotations

import copy
from functools import partial

import torch
import torchvision

from benchmarks.equality import require_equal
from benchmarks.result import Result
from benchmarks.timing import Options, Step, alternate
from rethinking_bn.diagnosis import diagnose
from rethinking_bn.population import estimate_population_statistics

_NEAR = 0.01  # standard errors, beside 1


def run(options: Options) -> Result:
    """Compare at 53 layers that all have a finding (as created), the most there is to do.

    Small images on a CPU: what is not spent in convolutions weighs more than it would with large
    ones, so the ratio is an upper limit.
    """
    result = Result("diagnosis")
    name = options.pick(quick="resnet18", cpu="resnet50", cuda="resnet50")
    count, size = options.pick(quick=(4, 16), cpu=(100, 64), cuda=(100, 224))
    images = options.pick(quick=2, cpu=4, cuda=32)
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().to(options.device).train()
    batches = list(torch.randn(count, images, 3, size, size).to(options.device))
    trained = copy.deepcopy(model)
    case = f"{name}, {count} batches of ({images}, 3, {size}, {size})"
    _population(trained, batches)
    fit = diagnose(trained, batches, output_batches=0, progress=False).of("stale-statistics")
    errors = 1 + torch.tensor([finding.evidence["z"] for finding in fit])
    what = f"{case}: stored statistics are the exact ones"
    result.checks[what] = require_equal(what, [errors], [torch.ones_like(errors)], _NEAR)
    look = partial(diagnose, model, batches, progress=False)
    steps: dict[str, Step] = {
        "population training": partial(_population, trained, batches),
        "diagnosis, no output effects": partial(look, output_batches=0),
        "diagnosis": look,
    }
    times = alternate(steps, options, 60.0, rounds=(3, 60), warmup=0)
    base = ("population training", times["population training"])
    for other in ("diagnosis, no output effects", "diagnosis"):
        result.measure(case, (other, times[other]), base)
    return result


def _population(model: torch.nn.Module, batches: list[torch.Tensor]) -> None:
    estimate_population_statistics(model, batches, len(batches), progress=False)
