"""Defects planted in healthy models, as weak or strong as one likes."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trials.cases import Case, Sample, others

# By strength; the others are there or not.
GRADED = (
    "stale-statistics",
    "repeated-use",
    "mixed-modes",
    "dead-channels",
    "domain-shift",
    "output-effect",
    "dependent-samples",
    "small-batch",
)
ONCE = ("identity-statistics", "non-finite", "impossible-variance")
KINDS = (*GRADED, *ONCE)
STRONG = {
    "dead-channels": 0.5,
    "domain-shift": 1.0,
    "dependent-samples": 1.0,
    "small-batch": 8.0,
}  # in detectors, where others are planted at 1.5
_OF_BATCHES = ("dependent-samples", "small-batch")
# strengths between which that of a given change of the output lies
_RANGE = {"dead-channels": (1e-4, 1.0), "domain-shift": (1e-4, 1.0)}
_RANGE |= {"dependent-samples": (0.02, 1.0), "small-batch": (1.0, 32.0)}


@dataclass
class Planted:
    """A model with a defect, the batches that show it, and where it is ("": anywhere)."""

    model: nn.Module
    batches: list[Any]
    target: list[Any] | None
    layer: str
    seed: int


class CalledTwice(nn.Module):
    """A norm layer that also serves a second domain, whose features are ``scale`` · x + offset.

    In training both are normalised alike and the result is the layer's; at inference they share
    the statistics of both.
    """

    def __init__(self, norm: Any, strength: float) -> None:
        super().__init__()
        self.norm, self.scale = norm, 1 + strength
        self.offset: Tensor
        offset = strength * (norm.running_var + norm.eps).sqrt() - strength * norm.running_mean
        self.register_buffer("offset", offset[:, None, None])
        other = norm.running_mean * self.scale + offset
        mean = (norm.running_mean + other) / 2
        spread = ((norm.running_mean - other) / 2).square()
        norm.running_var.mul_((1 + self.scale**2) / 2).add_(spread)
        norm.running_mean.copy_(mean)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(x) + self.norm(x * self.scale + self.offset)) / 2


def norms(model: nn.Module) -> dict[str, Any]:
    """Return the BN layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


@torch.no_grad()
def plant(kind: str, case: Case, strength: float, seed: int) -> Planted:
    """Plant one defect in a copy of a healthy model, or none.

    Args:
        kind: one of ``KINDS``, or "healthy".
        strength: for dependent-samples the fraction of a batch that is of one kind, for small-batch
            how many times smaller a batch is; else how far off, in about standard deviations.
        seed: chooses the layer and the batches.
    """
    model = copy.deepcopy(case.model)
    g = torch.Generator().manual_seed(seed)
    named = norms(model)
    name = list(named)[int(torch.randint(len(named), (), generator=g))]
    layer = named[name]
    sign = torch.randint(0, 2, (layer.num_features,), generator=g) * 2.0 - 1
    batches = target = None
    if kind == "stale-statistics":
        _shift(layer, strength, sign)
    elif kind == "mixed-modes":
        _shift(layer, strength, sign)
        model.train()
        layer.eval()
    elif kind == "output-effect":
        name = ""
        for each in named.values():
            random = torch.randint(0, 2, (each.num_features,), generator=g) * 2.0 - 1
            _shift(each, strength, random)
    elif kind == "repeated-use":
        _replace(model, name, CalledTwice(layer, strength))
        name += ".norm"
    elif kind == "dead-channels":
        count = max(1, round(strength * layer.num_features))
        chosen = torch.randperm(layer.num_features, generator=g)[:count]
        _conv_before(model, name).weight[chosen] = 0
    elif kind == "identity-statistics":
        layer.reset_running_stats()
    elif kind == "non-finite":
        layer.running_mean[0] = float("nan")
    elif kind == "impossible-variance":
        layer.running_var[0] = -0.1
    elif kind == "healthy":
        target, name = others(case).batches(seed, case.count), ""
    elif kind == "domain-shift":
        dark = [case.darken(sample, strength) for sample in case.target]
        target = replace(case, samples=dark).batches(seed, case.count)
        name = ""
    elif kind == "small-batch":
        size = max(2, round(case.size / strength))
        batches = case.batches(seed, max(case.count, 4 * case.size // size), size)
        name = ""
    elif kind == "dependent-samples":
        batches = grouped(case, strength, seed)
        name = ""
    else:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    return Planted(model, batches or case.batches(seed, case.count), target, name, seed)


def grouped(case: Case, fraction: float, seed: int) -> list[Any]:
    """Return batches of which a fraction is alike: of one class, or of one brightness."""
    g = torch.Generator().manual_seed(seed)

    def key(sample: Sample) -> float:
        label = None if isinstance(sample, dict) else sample[1]
        return float(label) if isinstance(label, Tensor) else case.brightness(sample)

    alike = sorted(case.samples, key=key)
    own = round(fraction * case.size)
    batches = []
    for _ in range(case.many):  # the scatter of few batches says little
        start = int(torch.randint(len(alike) - own + 1, (), generator=g))
        rest = torch.randint(len(alike), (case.size - own,), generator=g).tolist()
        batches.append(case.collate([*alike[start : start + own], *(alike[i] for i in rest)]))
    return batches


def _shift(layer: Any, strength: float, sign: Tensor) -> None:
    layer.running_mean += strength * sign * layer.running_var.sqrt()
    layer.running_var *= torch.exp(strength * sign)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _conv_before(model: nn.Module, name: str) -> nn.Conv2d:
    before: nn.Conv2d | None = None
    for other, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            before = module
        if other == name and before is not None:
            return before
    raise ValueError(f"no convolution before {name}")


@torch.no_grad()
def output_change(kind: str, case: Case, planted: Planted) -> float:
    """Return how much a defect changes the output of a classifier, in its standard deviations.

    For "domain-shift", between the same images of both domains; for what batches do, how much more
    it changes from population to mini-batch statistics than with healthy batches; else at
    inference.
    """
    if kind in _OF_BATCHES:
        usual = case.batches(planted.seed, case.count)
        return _batch_effect(case.model, planted.batches) - _batch_effect(case.model, usual)
    model = copy.deepcopy(planted.model).eval()
    if kind == "domain-shift":
        assert planted.target is not None
        dark = torch.cat([model(x) for x, _ in planted.target[:4]])
        clean = torch.cat([model(x) for x, _ in others(case).batches(planted.seed, 4)])
        return float((dark - clean).square().mean().sqrt() / clean.std())
    inputs = case.batches(1, 4)
    clean = torch.cat([case.model(x) for x, _ in inputs])
    changed = torch.cat([model(x) for x, _ in inputs])
    change = float((changed - clean).square().mean().sqrt() / clean.std())
    return change if change == change else float("inf")


def _batch_effect(model: nn.Module, batches: list[Any]) -> float:
    batches, training = batches[:16], copy.deepcopy(model).train()
    exact = torch.cat([model(x) for x, _ in batches])
    other = torch.cat([training(x) for x, _ in batches])
    return float((other - exact).square().mean().sqrt() / exact.std())


def strength_for(kind: str, case: Case, change: float, seed: int, steps: int = 7) -> float:
    """Return the strength at which the output changes that much, by bisection."""
    case = replace(case, many=case.count)
    low, high = _RANGE.get(kind, (1e-3, 4.0))
    for _ in range(steps):
        middle = (low * high) ** 0.5
        got = output_change(kind, case, plant(kind, case, middle, seed))
        low, high = (middle, high) if got < change else (low, middle)
    return high
