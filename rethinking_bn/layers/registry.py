"""Norm layers by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torchvision.models.convnext import LayerNorm2d

from rethinking_bn.layers.batch_norm import BatchNorm2d, BatchStatNorm2d, SyncBatchNorm2d
from rethinking_bn.layers.mabn.layer import MABN2d

_NUM_GROUPS = 32  # of GN, as in its paper and in detectron2


def _group_norm(num_features: int, **options: Any) -> nn.Module:
    num_groups = options.pop("num_groups", _NUM_GROUPS)
    if num_features % num_groups:
        raise ValueError(
            f"GN has {num_groups} groups, which do not divide {num_features} channels; "
            "the number of channels must be a multiple of the number of groups"
        )
    return nn.GroupNorm(num_groups, num_features, **options)


def _layer_norm(num_features: int, **options: Any) -> nn.Module:
    # over the channels of each position, as detectron2's LN
    return LayerNorm2d(num_features, **{"eps": 1e-6, **options})


_NORMS: dict[str, Callable[..., nn.Module]] = {
    "BN": BatchNorm2d,
    "SyncBN": SyncBatchNorm2d,
    "BatchStatBN": BatchStatNorm2d,
    "GN": _group_norm,
    "LN": _layer_norm,
    "MABN": MABN2d,
}


def norm_names() -> tuple[str, ...]:
    """Return the names :func:`get_norm` knows; "" stands for no norm."""
    return ("", *_NORMS)


def get_norm(
    norm: str | Callable[..., nn.Module | None] | None, num_features: int, **options: Any
) -> nn.Module | None:
    """Build a norm layer for (N, C, H, W) features by its name.

    Args:
        norm: "BN" (bears empty batches), "SyncBN" (ours: any device, any backend, empty ranks),
            "BatchStatBN" (mini-batch statistics at inference too), "GN" (32 groups), "LN" (over
            channels at each position), "MABN" (moving averages, after a CenConv2d), or "" or None
            for no norm; or a callable that takes the number of channels.
        num_features: C.
        options: keyword arguments of the layer, such as eps and momentum; for "MABN" also
            simulated_batch_size and batch_size (see MABN2d).

    Returns:
        The layer; None for no norm.

    Raises:
        ValueError: for an unknown name.
    """
    if norm is None or norm == "":
        return None
    if callable(norm):
        return norm(num_features, **options)
    if norm not in _NORMS:
        raise ValueError(f"norm must be one of {norm_names()} or a callable, got {norm!r}")
    return _NORMS[norm](num_features, **options)
