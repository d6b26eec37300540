"""What the tests of population training share: a written-out reference, models and a snapshot."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def seen_statistics(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of every value per channel, by one look at all of them."""
    values = torch.cat([x.double().transpose(0, 1).flatten(1) for x in inputs], dim=1)
    return values.mean(1), values.var(1)


def record_inputs(model: nn.Module, batches: list[Any]) -> dict[str, list[Tensor]]:
    """Run a copy of a model, in the modes it is in, and keep what each torch BN layer was given."""
    model = copy.deepcopy(model)
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            inputs: list[Tensor] = []
            seen[name] = inputs
            module.register_forward_pre_hook(lambda m, args, i=inputs: i.append(args[0].clone()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return seen


def assert_statistics(
    layer: Any, inputs: list[Tensor], *, rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    """Compare a layer's population statistics with those of everything it saw."""
    mean, var = seen_statistics(inputs)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=rtol, atol=atol)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=rtol, atol=atol)


def small_net(**kwargs: Any) -> Any:
    """Three BN layers, convolutions and dropout (module 4)."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm2d(3, **kwargs),
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5, **kwargs),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(5, 4, 1),
        nn.BatchNorm2d(4, **kwargs),
    )


def images(*sizes: int, seed: int = 1) -> list[Tensor]:
    """One batch (n, 3, 6, 4 + n) per given n, each with other moments."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, 3, 6, 4 + n, generator=generator) * (1 + i) + 3 * i
        for i, n in enumerate(sizes)
    ]


class Snapshot:
    """Everything of a model that a failed or finished run must leave as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.taken = self._take()

    def _take(self) -> dict[str, Any]:
        modules = list(self.model.modules())
        return {
            "values": [b.clone() for b in self.model.buffers()],
            "identities": [(name, id(b)) for name, b in self.model.named_buffers()],
            "attributes": [
                {
                    key: value
                    for key, value in vars(module).items()
                    if isinstance(value, (int, float, str, type(None)))
                }
                for module in modules
            ],
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],
            "random": (
                random.getstate(),
                [x.tolist() if hasattr(x, "tolist") else x for x in np.random.get_state()],
                torch.get_rng_state().tolist(),
            ),
        }

    def assert_unchanged(self, *, buffers: bool = True) -> None:
        now = self._take()
        if buffers:
            for old, new in zip(self.taken["values"], now["values"], strict=True):
                torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
        for key in ("identities", "attributes", "hooks", "random"):
            assert now[key] == self.taken[key], key


class Head(nn.Module):
    """One layer for all levels, like a detection head; its input is the list of levels."""

    norm: Any

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [self.norm(x) for x in levels]
