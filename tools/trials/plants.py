"""Defects planted in healthy models."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from rethinking_bn.population import estimate_population_statistics
from trials.cases import Case, image_of, with_image

# strengths that change the classifier's output by about a tenth of its spread; None: there or not
STRENGTHS: dict[str, float | None] = {
    "stale-statistics": 0.34,
    "repeated-use": 2.7,
    "mixed-modes": 0.34,
    "dead-channels": 0.14,
    "domain-shift": 0.24,
    "output-effect": 0.093,
    "small-batch": 3.2,
    "identity-statistics": None,
    "non-finite": None,
    "impossible-variance": None,
}
# batches whose samples depend on each other
BATCHES = ("copies", "crops", "RoIs", "sorted", "a fifth alike")
KINDS = ("healthy", *BATCHES, *STRENGTHS)


@dataclass
class Planted:
    """A model with a defect, the batches that show it, and where it is ("": anywhere)."""

    model: nn.Module
    batches: list[Any]
    target: list[Any] | None
    layer: str


class CalledTwice(nn.Module):
    """A norm layer that also serves a second domain, whose features are ``scale`` · x + offset."""

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


class RoIs(nn.Module):
    """A model on regions of each image, of half its height and width: ``size`` in a batch."""

    def __init__(self, model: nn.Module, size: int, g: torch.Generator) -> None:
        super().__init__()
        self.model, self.size, self.g = model, size, g

    def forward(self, x: Tensor) -> Any:
        half = x.new_tensor([x.shape[-1], x.shape[-2]]) / 2
        corners = torch.rand(self.size, 2, generator=self.g) * half
        boxes = torch.cat([corners, corners + half], dim=1).chunk(len(x))
        return self.model(roi_align(x, list(boxes), x.shape[-2:], aligned=True))


@torch.no_grad()
def plant(kind: str, case: Case, seed: int) -> Planted:
    """Plant one of KINDS in a copy of a healthy model; the seed chooses layer and batches."""
    model, strength = copy.deepcopy(case.model), STRENGTHS.get(kind) or 0.0
    g = torch.Generator().manual_seed(seed)
    named: dict[str, Any] = dict(model.named_modules())
    named = {name: m for name, m in named.items() if isinstance(m, nn.BatchNorm2d)}
    name = list(named)[int(torch.randint(len(named), (), generator=g))] if named else ""
    layer: Any = named.get(name)
    batches, target, where = None, None, ""
    if kind in BATCHES:
        batches = _dependent(kind, case, g)
        if kind == "RoIs":
            model = RoIs(model, case.size, g)
            estimate_population_statistics(model.train(), batches, progress=False)
    elif kind == "healthy":
        others = replace(case, samples=case.target)
        target = others.batches(seed, case.count) if case.target else None
    elif kind == "domain-shift":
        half = 64 if image_of(case.target[0]).max() > 2 else 0.25
        images = [image_of(s) * (1 - 0.5 * strength) + half * strength for s in case.target]
        dark = list(map(with_image, case.target, images))
        target = replace(case, samples=dark).batches(seed, case.count)
    elif kind == "small-batch":
        size = max(2, round(case.size / strength))
        batches = case.batches(seed, max(case.count, 4 * case.size // size), size)
    elif kind == "output-effect":
        for each in named.values():
            _shift(each, strength, g)
    else:
        where = name
        if kind in ("stale-statistics", "mixed-modes"):
            _shift(layer, strength, g)
        if kind == "mixed-modes":
            model.train()
            layer.eval()
        elif kind == "repeated-use":
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, CalledTwice(layer, strength))
            where += ".norm"
        elif kind == "dead-channels":
            count = max(1, round(strength * layer.num_features))
            chosen = torch.randperm(layer.num_features, generator=g)[:count]
            modules = [m for m in model.modules() if m is layer or isinstance(m, nn.Conv2d)]
            modules[modules.index(layer) - 1].weight[chosen] = 0  # type: ignore[operator]
        elif kind == "identity-statistics":
            layer.reset_running_stats()
        elif kind == "non-finite":
            layer.running_mean[0] = float("nan")
        elif kind == "impossible-variance":
            layer.running_var[0] = -0.1
    return Planted(model, batches or case.batches(seed, case.count), target, where)


def _shift(layer: Any, strength: float, g: torch.Generator) -> None:
    sign = torch.randint(0, 2, (layer.num_features,), generator=g) * 2.0 - 1
    layer.running_mean += strength * sign * layer.running_var.sqrt()
    layer.running_var *= torch.exp(strength * sign)


def _dependent(kind: str, case: Case, g: torch.Generator) -> list[Any]:
    """Return batches of each image twice, of one image or its crops, or of images alike."""

    def some(count: int, of: int) -> list[int]:
        return torch.randint(of, (count,), generator=g).tolist()

    def key(sample: Any) -> float:
        label = sample[1] if isinstance(sample, tuple) else None
        return float(label if isinstance(label, Tensor) else image_of(sample).float().std())

    samples, size, total = case.samples, case.size, len(case.samples)
    alike = sorted(samples, key=key)
    batches = []
    for _ in range(case.many):
        if kind == "RoIs":
            batch = [samples[i] for i in some(1, total)]
        elif kind == "copies":
            batch = [samples[i] for i in some(size // 2, total)] * 2
        elif kind == "crops":
            (sample,) = (samples[i] for i in some(1, total))
            image = image_of(sample).float()
            h, w = image.shape[-2] // 2, image.shape[-1] // 2
            corners = zip(some(size, h + 1), some(size, w + 1), strict=True)
            crops = [image[:, a : a + h, b : b + w] for a, b in corners]
            scaled = [nn.functional.interpolate(c[None], (2 * h, 2 * w))[0] for c in crops]
            batch = [with_image(sample, crop) for crop in scaled]
        else:
            own = size if kind == "sorted" else round(size / 5)
            (start,) = some(1, total - own + 1)
            batch = [*alike[start : start + own], *(samples[i] for i in some(size - own, total))]
        batches.append(case.collate(batch))
    return batches
