"""Norm layers by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d

from rethinking_bn.layers.batch_norm import BatchNorm2d, BatchStatNorm2d, SyncBatchNorm2d
from rethinking_bn.layers.mabn import MABN2d


class InstanceNorm2d(nn.InstanceNorm2d):
    """nn.InstanceNorm2d with an affine that bears empty batches and single values per channel.

    GN with as many groups as channels: (N, C, H, W) or (C, H, W). A single value has variance 0 and
    gives the bias.
    """

    def __init__(self, num_features: int, affine: bool = True, **options: Any) -> None:
        if options.get("track_running_stats"):
            raise ValueError(
                "IN keeps no running statistics here (track_running_stats=True), as those of an "
                "image are its own at inference, too; pass nn.InstanceNorm2d for a layer that does"
            )
        super().__init__(num_features, affine=affine, **options)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        batch = input if input.dim() == 4 else input.unsqueeze(0)
        out = torch.group_norm(batch, self.num_features, self.weight, self.bias, self.eps)
        return out if input.dim() == 4 else out.squeeze(0)


def _group_norm(num_features: int, num_groups: int = 32, **options: Any) -> nn.Module:
    if num_groups < 1 or num_features % num_groups:
        raise ValueError(f"GN has {num_groups} groups, which do not divide {num_features} channels")
    return nn.GroupNorm(num_groups, num_features, **options)


def _layer_norm(num_features: int, **options: Any) -> nn.Module:
    # over the channels of each position, as detectron2's LN
    return LayerNorm2d(num_features, **{"eps": 1e-6, **options})


_NORMS: dict[str, Callable[..., nn.Module]] = {
    "BN": BatchNorm2d,
    "SyncBN": SyncBatchNorm2d,
    "BatchStatBN": BatchStatNorm2d,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": _group_norm,
    "LN": _layer_norm,
    "IN": InstanceNorm2d,
    "MABN": MABN2d,
}


def norm_names() -> tuple[str, ...]:
    """Return the names :func:`get_norm` knows; "" stands for no norm."""
    return ("", *_NORMS)


def get_norm(
    norm: str | Callable[..., nn.Module | None] | None, num_features: int, **options: Any
) -> nn.Module | None:
    """Return a norm layer for (N, C, H, W) features by its name; None for no norm.

    Args:
        norm: "BN" (bears empty batches), "SyncBN" (ours: any device, any backend, empty ranks),
            "BatchStatBN" (mini-batch statistics at inference too), "FrozenBN" (torchvision's: fixed
            statistics and affine), "GN" (32 groups), "LN" (over channels at each position), "IN"
            (over each image and channel), "MABN" (moving averages, after a CenConv2d), or "" or
            None for no norm; or a callable that takes the number of channels.
        num_features: C.
        options: keyword arguments of the layer, such as eps and momentum; for "GN" also
            num_groups, for "MABN" simulated_batch_size and batch_size (see MABN2d).

    Raises:
        ValueError: for an unknown name, channels that GN's groups do not divide, or an "IN" with
            ``track_running_stats``.
    """
    if norm is None or norm == "":
        return None
    if callable(norm):
        return norm(num_features, **options)
    if norm not in _NORMS:
        raise ValueError(f"norm must be one of {norm_names()} or a callable, got {norm!r}")
    return _NORMS[norm](num_features, **options)
