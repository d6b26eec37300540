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

Rows = Tensor | Sequence[Tensor] | None

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
#: groups of rows whose steps of one moving average are told apart by bits
_MOST_GROUPS = 63


def takes_triton(
    xs: Sequence[Tensor],
    weights: Rows,
    biases: Rows,
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
    if choice == "eager" or (choice == "auto" and not xs[0].is_cuda):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    for x in xs:
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            return False  # a fake tensor or a proxy: somebody traces
    reason = _obstacle(xs, weights, biases, holders, row_groups)
    if reason is not None and choice == "triton":
        raise RuntimeError(f"{VARIABLE}=triton, but {reason}")
    return reason is None


def _obstacle(
    xs: Sequence[Tensor],
    weights: Rows,
    biases: Rows,
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
    for x in xs:
        if x.dtype != dtype or x.device != device:
            return "the tensors differ in type or device"
    if layout(xs) is None:
        return "the tensors are neither all contiguous nor all channels-last"
    if row_groups is not None and len(row_groups) > _MOST_GROUPS:
        return f"there are {len(row_groups)} row groups, more than {_MOST_GROUPS}"
    buffers = [holder._buffers for holder in holders]  # attributes take ten times as long
    for of_one in buffers:
        if of_one["num_batches_tracked"] is None:
            return "num_batches_tracked is None"
    # what does not move with the module or keeps another type is the user's own doing
    used = [rows[0] for rows in (weights, biases) if rows is not None]
    used += [of_one["running_mean"] for of_one in buffers[:1]]
    for t in used:
        if t is None or t.device != device or t.dtype not in _TYPES:
            found = "None" if t is None else f"{t.dtype} on {t.device}"
            return f"a parameter or buffer is {found}, beside {dtype} on {device}"
    return None


def layout(xs: Sequence[Tensor]) -> torch.memory_format | None:
    """Return the memory format that all tensors are in, contiguous first, or None."""
    for x in xs:
        if not x.is_contiguous():
            break
    else:
        return torch.contiguous_format
    last = torch.channels_last
    for x in xs:
        if x.dim() != 4 or not x.is_contiguous(memory_format=last):
            return None
    return last


@lru_cache(maxsize=1)
def _triton() -> tuple[str | None, bool]:
    """Return why Triton cannot be used, or None; and whether it interprets."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}", False
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 3):
        return f"triton {triton.__version__} takes no tuples of tensors, 3.3 does", False
    from rethinking_bn.numerics.triton.tiles import pick

    return None, type(pick).__name__ == "InterpretedFunction"
