"""Population statistics by plain sums, for checking."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class PlainPopulation:
    """Sums of x and x² of everything that BatchNorm layers take in, in float64.

    Register it on layers that take a tensor (N, C, H, W) or a list of them; a list is pooled.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.sums: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
        self._handles = [layer.register_forward_pre_hook(self._add) for layer in self.sums]

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def _add(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        for x in [args[0]] if isinstance(args[0], Tensor) else args[0]:
            x = x.detach().double()
            n = torch.full((x.shape[1],), x.numel() / x.shape[1], dtype=x.dtype, device=x.device)
            row = torch.stack([n, x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
            self.sums[layer].append(row)

    def mean_and_variance(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Return (C,) mean and unbiased variance of what a layer has seen."""
        n, total, squares = torch.stack(self.sums[layer]).sum(0)
        mean = total / n
        return mean, (squares / n - mean.square()) * n / (n - 1)
