"""Small batches: BN, Batch Renormalization, GN and MABN over the batch size; GN over its groups.

A batch is what one forward holds; the gradients of several add up to one SGD step of 32 samples, as
on a GPU with little memory, so that all sizes train alike but for the norm. Batch Renormalization
(Ioffe, 2017) is here for reference: BatchNorm whose training normalises nearly by the moving
statistics. Population statistics are estimated after training, by the same batches for BN, Batch
Renormalization and MABN: what is compared is training, not how well an average follows.

The images differ in brightness, which a filter passes on as an offset of its own. MABN's centred
filters do not, and GN with one group per channel takes it away, which is to their advantage here;
larger groups keep it, and GN is behind BN with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rethinking_bn.layers import BatchNorm2d, CenConv2d, MABN2d
from studies.data import CAMERAS, QUICK_CAMERAS, Digits, load_digits
from studies.study import Claim, Panel, Point, Series, Settings, Study, Values
from studies.training import error, make_net, precise, trained

_SIZES = (2, 8, 32)
_GROUPS = {"1 (LayerNorm)": 1, "2": 2, "4": 4, "8": 8, "C (InstanceNorm)": None}  # of C channels
# The MABN paper: ImageNet ResNet-50 error in % (100 - top-1), the GN paper's is relative to BN's.
_PAPER = {"BN": {2: 35.22, 32: 23.41}, "Batch Renorm": {2: 30.29}, "MABN": {2: 23.67}, "GN": {}}
_GN_GROUPS = 4  # of GN beside the others


class BatchRenorm2d(nn.BatchNorm2d):
    """Batch Renormalization, a reference: BN corrected towards the moving statistics in training.

    y = (x - mean) / std · r + d with r = std / running_std in [1 / r_max, r_max] and d = (mean -
    running_mean) / running_std in [-d_max, d_max], both constants in the backward; r = 1 and
    d = 0 for the first ``warmup`` steps.
    """

    def __init__(self, num_features: int, *, warmup: int, r_max: float, d_max: float) -> None:
        super().__init__(num_features, momentum=0.1)
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
            input, self.running_mean, self.running_var, None, None, True, 0.1, self.eps
        )
        scale, shift = r * self.weight, d * self.weight + self.bias
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def run(settings: Settings, seed: int, device: torch.device) -> Iterator[Values]:
    """Yield once per norm and batch size, then once per number of groups of GN."""
    digits = load_digits(device, seed, settings["conditions"])
    for size in _SIZES:
        calls = settings["steps"] * settings["batch_size"] // size  # of a layer, in the training
        warmup = max(1, round(settings["warmup"] * calls))
        renorm: Any = partial(BatchRenorm2d, warmup=warmup, r_max=3.0, d_max=5.0)
        mabn: Any = partial(
            MABN2d, simulated_batch_size=32, batch_size=size,
            warmup_iters=warmup, correction_start=warmup,
        )  # fmt: skip
        for name, norm in (("BN", BatchNorm2d), ("Batch Renorm", renorm), ("MABN", mabn)):
            yield {f"{name}, {size}": _error(settings, digits, seed, size, norm, name == "MABN")}
    for label, groups in _GROUPS.items():
        norm = _group_norm(groups)
        value = _error(settings, digits, seed, settings["batch_size"], norm)
        # what GN computes of a sample does not depend on the others: one training for all sizes
        every = {f"GN, {size}": value for size in _SIZES} if groups == _GN_GROUPS else {}
        yield {f"GN, G={label}": value, **every}


def _group_norm(groups: int | None) -> Any:
    """Return channels -> GN; None: one group per channel."""
    return lambda channels: nn.GroupNorm(groups or channels, channels)


def _error(
    settings: Settings, digits: Digits, seed: int, size: int, norm: Any, centred: bool = False
) -> float:
    make = partial(make_net, norm, conv=CenConv2d if centred else nn.Conv2d)
    net = trained(settings, digits.train, seed, make=make, micro_batch=size)
    if any(hasattr(module, "momentum") for module in net.modules()):  # not GN
        precise(net, digits.train.images, settings["population_batch"])
    return error(net, digits.test)


STUDY = Study(
    name="small-batch",
    title="Norms at small batches",
    source="MABN and GN papers",
    panels=[
        Panel(
            "SGD batch of 32",
            "samples per forward",
            [
                Series(norm, [Point(f"{norm}, {n}", str(n), paper.get(n)) for n in _SIZES])
                for norm, paper in _PAPER.items()
            ],
            "MABN",
        ),
        Panel(
            "GN",
            "groups",
            [Series("GN", [Point(f"GN, G={label}", label) for label in _GROUPS])],
        ),
    ],
    claims=[
        Claim("BN is worse at 2 than at 32", low="BN, 32", high="BN, 2"),
        Claim("MABN beats BN at 2", low="MABN, 2", high="BN, 2"),
        Claim("Batch Renorm beats BN at 2", low="Batch Renorm, 2", high="BN, 2"),
        Claim("MABN beats Batch Renorm at 2", low="MABN, 2", high="Batch Renorm, 2"),
        Claim("GN beats BN at 2", low="GN, 2", high="BN, 2"),
    ],
    settings={
        "steps": 300,
        "batch_size": 32,  # of an SGD step
        "conditions": CAMERAS,
        "lr": 0.05,
        "warmup": 0.1,  # of the training: before moving averages are used (MABN, Batch Renorm)
        "population_batch": 100,
    },
    quick={"steps": 3, "conditions": QUICK_CAMERAS},
    run=run,
    seeds=1,
)
