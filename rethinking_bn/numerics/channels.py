"""Passes over one tensor (N, C, *) with a coefficient per channel, by torch's fused operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# On the CPU, tensors of at least so many values are worked through in blocks that a core's cache
# holds. Temporaries of the tensor's size would come from memory for every operator.
_MANY, _BLOCK = 2**16, 2**18
# The CPU's channels-last operators add up in float32, one value after the other. More values than
# this lose digits.
SEQUENTIAL = 4096


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which statistics of an input of type ``dtype`` are computed."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def is_plain(x: Tensor) -> bool:
    """Return whether only plain operators may work on ``x``, because something looks on.

    That is a compiler, an exporter, a tracer, a transform of torch.func, or forward-mode
    differentiation. Devices but CPUs and CUDA have no other operators.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or x.device.type not in ("cpu", "cuda")
    )


def is_channels_last(x: Tensor) -> bool:
    """Return whether x is in channels-last format; it may be contiguous as well."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def broadcast(channels: Tensor, like: Tensor) -> Tensor:
    """View (C,) so that it broadcasts over the channels of (N, C, *)."""
    return channels.view(1, -1, *([1] * (like.dim() - 2)))


def reduced_dims(x: Tensor) -> list[int]:
    """Return all dimensions of (N, C, *) but that of the channels."""
    return [d for d in range(x.dim()) if d != 1]


def in_blocks(x: Tensor) -> bool:
    """Return whether x is large, on the CPU, and in a layout that :func:`as_rows` can view."""
    large = x.numel() >= _MANY and x.device.type == "cpu" and x.dim() > 2
    return large and (x.is_contiguous() or is_channels_last(x))


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """View (N, C, *) as a matrix, in the order of its memory.

    Returns:
        rows, and the dimension that has no channels: (N·C, K) and 1 for contiguous tensors,
        (N·K, C) and 0 for channels-last ones.
    """
    if x.is_contiguous():
        return x.flatten(2).flatten(0, 1), 1
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]), 0


def beside_rows(channels: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return (C,) values so that they broadcast beside :func:`as_rows` of x."""
    if dim == 0:
        return channels.expand(x.numel() // len(channels), -1)
    return channels.repeat(len(x))[:, None]


def blocks(rows: Tensor) -> Iterator[slice]:
    """Yield slices of consecutive rows, each of about a block."""
    step = max(1, torch.get_num_threads() * _BLOCK // rows.shape[1])
    for start in range(0, len(rows), step):
        yield slice(start, min(start + step, len(rows)))


def fused(
    x: Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: bool,
    momentum: Any,
    eps: float,
    exported: bool = False,
) -> Tensor:
    """Call torch's operator with types and strides that it does right."""
    dtype = statistics_dtype(x.dtype)
    weight, bias, mean, variance = (
        v if v is None or v.dtype == dtype else v.to(dtype) for v in (weight, bias, mean, variance)
    )
    x = settled(x)
    y = torch.batch_norm(x, weight, bias, mean, variance, training, momentum, eps, exported)
    if y.requires_grad and 1 in x.shape and not is_plain(x):
        # its gradient may have such strides, too
        y.register_hook(lambda dy: None if dy is None else settled(dy))
    return y


def settled(x: Tensor) -> Tensor:
    """Return x, contiguous if its strides are two layouts at once.

    With sizes of 1, strides such as (40, 1, 8, 1) of ``tokens.transpose(1, 2).unsqueeze(-1)`` are
    channels-last for some of torch's checks, and contiguous for others. Its CPU operator then pairs
    elements of the input and of the gradient that do not belong together.
    """
    if x.dim() != 4 or torch.compiler.is_compiling() or x.is_contiguous():
        return x
    if not x.is_contiguous(memory_format=torch.channels_last):
        return x
    _, c, h, w = x.shape
    return x if x.stride() == (h * w * c, 1, w * c, c) else x.contiguous()


def suits_torch(x: Tensor) -> bool:
    """Return whether torch's operator normalises x by itself, and exactly.

    It divides by zero for a single value per channel. On the CPU it loses digits over many values
    in channels-last format, and rounds sums of half types for some strides.
    """
    size = x.numel() // x.shape[1]
    if size < 2 or x.device.type != "cpu" or x.is_contiguous():
        return size > 1
    wide = x.dtype == statistics_dtype(x.dtype)
    return size <= SEQUENTIAL and (wide or is_channels_last(x))


def affine_normalize(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Return weight · (x - mean) / sqrt(variance + eps) + bias in one pass, in x's type.

    Args:
        x: (N, C, *), may be empty.
        mean, variance, weight, bias: (C,).
    """
    return fused(x, weight, bias, mean, variance, False, 0.0, eps)


def exported_normalize(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """As :func:`affine_normalize`, in the one operator that every exporter and counter knows.

    Args:
        mean, variance: (C,), or None for those of x itself; x may be empty all the same.
    """
    return torch.batch_norm(x, weight, bias, mean, variance, mean is None, 0.0, eps, True)


def gradient_sums(
    dy: Tensor, x: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (C,) Σ dy and (C,) Σ dy·x̂ with x̂ = (x - mean) / sqrt(variance + eps)."""
    if x.numel() == 0:  # the fused CPU operator ends the process on an empty tensor
        return torch.zeros_like(mean), torch.zeros_like(mean)
    if is_plain(x):
        dims = reduced_dims(x)
        dy, centred = dy.to(mean.dtype), x.to(mean.dtype) - broadcast(mean, x)
        return dy.sum(dims), (dy * centred).sum(dims) * (variance + eps).rsqrt()
    last = is_channels_last(x) and not x.is_contiguous()
    if mean.dtype != x.dtype and not (last or x.is_contiguous()):
        x = x.contiguous()  # of other strides the kernel rounds sums to the half type
    dy = dy.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    # the mean in place of a weight tells it the type to return
    _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
        dy, x, mean, mean, variance, None, None, False, eps, [False, True, True]
    )
    return of_bias, of_weight


def combine(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a·dy + b·x + c per channel as a new tensor in x's type.

    Terms of half types may nearly cancel, so they are added before anything is rounded.
    """
    if is_plain(x):
        return (broadcast(a, x) * dy + (broadcast(b, x) * x + broadcast(c, x))).to(x.dtype)
    if x.dtype == a.dtype:
        zero, one = torch.zeros_like(b), torch.ones_like(b)
        return affine_normalize(x, zero, one, b, c, 0.0).addcmul_(dy, broadcast(a, dy))
    if in_blocks(x):
        return _combine_blocks(dy, x, a, b, c)
    out = torch.addcmul(broadcast(c, x), x, broadcast(b, x))
    return out.addcmul_(dy, broadcast(a, x)).to(x.dtype)


def _combine_blocks(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    (rows, dim), out = as_rows(x), torch.empty_like(x)
    dys = as_rows(
        dy.contiguous(memory_format=torch.channels_last if dim == 0 else torch.contiguous_format)
    )[0]
    outs = as_rows(out)[0]
    a, b, c = (beside_rows(channels, x, dim) for channels in (a, b, c))
    buffer = x.new_empty(next(blocks(rows)).stop, rows.shape[1], dtype=a.dtype)
    for block in blocks(rows):
        part = torch.mul(rows[block], b[block], out=buffer[: block.stop - block.start])
        outs[block] = part.add_(c[block]).addcmul_(dys[block], a[block])
    return out


def refuse(gradients: Sequence[Any]) -> list[Any]:
    """Return gradients that raise when they are differentiated, whatever needs a gradient.

    ``once_differentiable`` lets those pass in silence whose own incoming gradient needs none.
    """
    anchor = torch.zeros((), requires_grad=True)
    given = iter(_Refused.apply(anchor, *(g for g in gradients if g is not None)))
    return [None if g is None else next(given) for g in gradients]


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.clone() for g in gradients)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        raise RuntimeError(
            "no derivative of a derivative here: statistics pooled over ranks (sync) and MABN2d's "
            "moving averages have first derivatives only"
        )
