"""Averaging weights beside torch's own foreach EMA."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.equality import require_equal, tolerance_of
from benchmarks.result import Result
from benchmarks.timing import Options, Step, alternate
from rethinking_bn.averaging import AveragedWeights

_OURS = "AveragedWeights.update"
_TORCH = "torch's AveragedModel, get_ema_multi_avg_fn"
_DECAY = 0.999


def run(options: Options) -> Result:
    """Compare one EMA update of a small and of a large network."""
    import torchvision

    result = Result("averaging")
    for name in ("resnet18",) if options.quick else ("resnet18", "resnet50"):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, num_classes=10).to(options.device)
        _compare(result, name, model, options)
    return result


def _compare(result: Result, name: str, model: nn.Module, options: Options) -> None:
    averaged = AveragedWeights(model, decay=_DECAY, warmup=False)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(_DECAY))
    theirs.update_parameters(model)  # torch's first update copies
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor += 1
    averaged.update(model)
    theirs.update_parameters(model)
    found: list[Any] = list(averaged.module.state_dict().values())
    wanted: list[Any] = list(theirs.module.state_dict().values())
    error = require_equal(name, found, wanted, tolerance_of(torch.float32))
    result.checks[f"{name}, weights and buffers"] = error

    sides: dict[str, Step] = {
        _OURS: lambda: averaged.update(model),
        _TORCH: lambda: theirs.update_parameters(model),
    }
    times = alternate(sides, options, 8.0)
    case = f"{name}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million weights"
    result.measure(case, (_OURS, times[_OURS]), (_TORCH, times[_TORCH]), goal=1.1)
