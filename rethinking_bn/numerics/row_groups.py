"""Normalising groups of consecutive rows of one tensor, each by moments of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rethinking_bn.numerics.moments import Moments
from rethinking_bn.numerics.normalize import Normalized, normalize
from rethinking_bn.numerics.running import update_running_statistics
from rethinking_bn.numerics.triton.choice import takes_triton

# Groups of at most so many values are normalised all at once: the small operators of each group
# then cost more than copying its values there and back.
_SMALL = 2**16


def check_row_groups(sizes: Sequence[int], rows: int) -> None:
    """Raise a ValueError unless the sizes of the groups sum up to the number of rows."""
    if sum(sizes) != rows:
        raise ValueError(f"row groups {tuple(sizes)} do not sum up to the {rows} rows given")


def normalize_row_groups(
    x: Tensor,
    sizes: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    holders: Sequence[Any] = (),
    momentum: float | None = None,
) -> Normalized:
    """Normalise as :func:`normalize` does, a part and a pool for each group.

    Args:
        x: (N, C, *), may be empty.
        sizes: rows of each group; see :func:`check_row_groups`.
        weight, bias: (C,), or None.
        holders, momentum: the one holder of running statistics, which takes a step for each group
            that has a row; or none.

    Returns:
        one output.
    """
    weights, biases = (None if p is None else [p] for p in (weight, bias))
    if takes_triton([x], weights, biases, holders, sizes):
        from rethinking_bn.numerics.triton import batch_norm  # imports Triton

        return Normalized(
            *batch_norm.normalize(
                [x],
                weights,
                biases,
                one_part=False,
                pooled=False,
                eps=eps,
                holders=holders,
                momentum=momentum,
                row_groups=tuple(sizes),
            )
        )
    small = 0 < x.numel() <= len(sizes) * _SMALL
    if small and len(set(sizes)) == 1 and x.is_contiguous():
        return _normalize_as_channels(x, len(sizes), weight, bias, eps, holders, momentum)
    each = list(range(len(sizes)))
    outputs, local = normalize(
        x.split(list(sizes)),
        weights,
        biases,
        parts=each,
        pools=each,
        eps=eps,
        holders=holders,
        momentum=momentum,
    )
    return Normalized([torch.cat(outputs)], local)


def _normalize_as_channels(
    x: Tensor,
    k: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    holders: Sequence[Any],
    momentum: float | None,
) -> Normalized:
    """Normalise K groups of n rows as (n, K·C, H, W): one pass, however many groups."""
    n = len(x) // k
    folded = x.view(k, n, -1).transpose(0, 1).reshape(n, k * x.shape[1], *x.shape[2:])
    affine = (None if p is None else [p.repeat(k)] for p in (weight, bias))
    (out,), rows = normalize([folded], *affine, parts=[0], pools=[0], eps=eps)
    assert rows is not None  # there were no holders to take them
    each = Moments(rows.count.expand(k), rows.mean.view(k, -1), rows.m2.view(k, -1))
    if holders:
        update_running_statistics(holders, each, momentum)
    return Normalized([out.view(n, k, -1).transpose(0, 1).reshape(x.shape)], each)
