"""Which implementation of the numeric core a call takes: RETHINKING_BN_KERNELS."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

VARIABLE = "RETHINKING_BN_KERNELS"
CHOICES = ("auto", "eager", "triton")

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
#: groups of rows whose steps of one moving average are told apart by bits
_MOST_GROUPS = 63


def takes_triton(
    xs: Sequence[Tensor],
    weights: Tensor | Sequence[Tensor] | None,
    biases: Tensor | Sequence[Tensor] | None,
    holders: Sequence[Any] = (),
    row_groups: Sequence[int] | None = None,
) -> bool:
    """Return whether a training step on these tensors runs in the Triton kernels.

    ``auto`` (the default) takes them for CUDA tensors where they can run, ``triton`` everywhere or
    not at all, which is how Triton's interpreter (TRITON_INTERPRET=1) gets CPU tensors. What is
    compiled, traced, exported or transformed by torch.func takes the plain operators, whatever was
    chosen.

    Args:
        xs: the inputs.
        weights, biases: (C,) each, or None.
        holders: modules with the buffers that a kernel moves.
        row_groups: rows of groups with statistics of their own.

    Raises:
        ValueError: for another value of the variable.
        RuntimeError: where ``triton`` was chosen and cannot run, naming why.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "eager" or (choice == "auto" and xs[0].device.type != "cuda"):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if any(type(x) is not Tensor and type(x) is not nn.Parameter for x in xs):
        return False  # a fake tensor or a proxy: somebody traces
    if torch._C._are_functorch_transforms_active():
        return False
    reason = _obstacle(xs, [*_listed(weights), *_listed(biases)], holders, row_groups)
    if reason is not None and choice == "triton":
        raise RuntimeError(f"{VARIABLE}=triton, but {reason}")
    return reason is None


def _listed(rows: Tensor | Sequence[Tensor] | None) -> Sequence[Tensor]:
    return () if rows is None else tuple(rows)


def _obstacle(
    xs: Sequence[Tensor],
    used: Sequence[Tensor],
    holders: Sequence[Any],
    row_groups: Sequence[int] | None,
) -> str | None:
    """Return why the kernels cannot run, or None."""
    missing, interpreted = _triton()
    if missing is not None:
        return missing
    device, dtype = xs[0].device, xs[0].dtype
    if device.type != "cuda" and not interpreted:
        return f"the tensors are on {device} and TRITON_INTERPRET=1 was not set before the import"
    if dtype not in _TYPES:
        return f"there are no kernels for {dtype}"
    if any(x.dtype != dtype or x.device != device for x in xs):
        return "the tensors differ in type or device"
    if layout(xs) is None:
        return "the tensors are neither all contiguous nor all channels-last"
    if row_groups is not None and len(row_groups) > _MOST_GROUPS:
        return f"there are {len(row_groups)} row groups, more than {_MOST_GROUPS}"
    buffers: list[Tensor | None] = []
    for holder in holders:
        buffers += (holder.running_mean, holder.running_var, holder.num_batches_tracked)
    for t in (*used, *buffers):
        if t is None:
            return "a running statistic is None"
        if t.device != device:
            return f"the tensors are on {device}, a parameter or buffer on {t.device}"
        if t.dtype not in _TYPES and t.dtype != torch.int64:
            return f"a parameter or buffer is {t.dtype}"
    return None


def layout(xs: Sequence[Tensor]) -> torch.memory_format | None:
    """Return the memory format that all tensors are in, contiguous first, or None."""
    if all([x.is_contiguous() for x in xs]):
        return torch.contiguous_format
    last = torch.channels_last
    if all([x.dim() == 4 and x.is_contiguous(memory_format=last) for x in xs]):
        return last
    return None


@lru_cache(maxsize=1)
def _triton() -> tuple[str | None, bool]:
    """Return why Triton cannot be used, or None; and whether it interprets."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}", False
    del triton
    from rethinking_bn.numerics.triton.forward import moments

    return None, type(moments).__name__ == "InterpretedFunction"
