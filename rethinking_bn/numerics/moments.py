"""Moments of channels, and the passes over one tensor (N, C, *) that need them.

Moments (count, mean, M2) are the one representation in which statistics are pooled. M2 is the sum
of squared deviations from the mean. Merging moments is exact over levels, iterations and ranks,
and unlike E[x²] - E[x]² it does not cancel when the mean is large beside the standard deviation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup

from rethinking_bn.distributed import all_gather

is_exporting: Any = getattr(torch.compiler, "is_exporting", lambda: False)  # not in torch < 2.7
# On the CPU, tensors of so many values are worked through in blocks that a core's cache holds.
_MANY, _BLOCK = 2**16, 2**18
# The CPU's channels-last operators add up in float32, value after value: more lose digits.
_SEQUENTIAL = 4096


class Moments(NamedTuple):
    """Moments of C channels in D sets: counts (D,) in floating point, means and M2 (D, C).

    Mean and M2 of a set without values are 0.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nothing here calls
    mean: Tensor
    m2: Tensor

    def variance(self, *, unbiased: bool = False) -> Tensor:
        """Return (D, C): m2 / count, or m2 / (count - 1); 0 where that would divide by zero."""
        divisor = self.count - 1 if unbiased else self.count
        return self.m2 / divisor.clamp(min=1)[..., None]

    def to(self, target: torch.dtype | torch.device) -> Moments:
        """Return the moments with every tensor moved by ``Tensor.to``."""
        return Moments(*(value.to(target) for value in self))  # type: ignore[call-overload]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which statistics of an input of type ``dtype`` are computed."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def is_plain(x: Tensor) -> bool:
    """Return whether only plain operators may work on ``x``, as those of other devices do.

    A compiler, a tracer, a transform of torch.func or forward-mode differentiation looks on.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or x.device.type not in ("cpu", "cuda")
    )


def broadcast(channels: Tensor, like: Tensor) -> Tensor:
    """View (C,) so that it broadcasts over the channels of (N, C, *)."""
    return channels.view(1, -1, *([1] * (like.dim() - 2)))


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def local_moments(x: Tensor) -> Moments:
    """Return this process's moments of one tensor (N, C, *): count (), mean (C,), m2 (C,).

    Half types are accumulated in float32; x may be empty. No gradient, unless :func:`is_plain`.
    """
    plain = is_plain(x)
    with torch.set_grad_enabled(plain and torch.is_grad_enabled()):
        return Moments(*(value[0] for value in moments_of([x], plain)))


def moments_of(xs: Sequence[Tensor], plain: bool) -> Moments:
    """Return :func:`local_moments` of L tensors, one row each; within no_grad unless ``plain``."""
    channels = xs[0].shape[1]
    counts = [x.numel() // max(channels, 1) for x in xs]
    pairs: list[tuple[Tensor, Tensor]] = []
    for x, n in zip(xs, counts, strict=True):
        zero = x.new_zeros(channels, dtype=statistics_dtype(x.dtype)) if n == 0 else None
        pairs.append(_mean_variance(x, plain) if zero is None else (zero, zero))
    values = torch.stack([mean for mean, _ in pairs] + [variance for _, variance in pairs])
    mean, variance = values.view(2, len(xs), -1).unbind()
    count = on_device(counts, values)
    return Moments(count, mean, variance * count[:, None])


def on_device(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Return numbers as a tensor of ``like``'s type and device, without waiting for the device."""
    if torch.compiler.is_compiling():  # sizes that a compiler keeps open are no constants
        return torch.stack([like.new_full((), float(n)) for n in numbers])
    values = torch.tensor(numbers, dtype=like.dtype)
    return values if like.device.type == "cpu" else values.to(like.device, non_blocking=True)


def _mean_variance(x: Tensor, plain: bool) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance (C,) of a tensor that is not empty."""
    dtype, on_cpu = statistics_dtype(x.dtype), x.device.type == "cpu"
    if plain:
        variance, mean = torch.var_mean(x.to(dtype), _all_but_channels(x), correction=0)
        return mean, variance
    if _is_worth_blocks(x) and (dtype == x.dtype or not x.is_contiguous()):
        return _mean_variance_in_blocks(x, dtype)
    if on_cpu and not x.is_contiguous():
        if not _is_channels_last(x) or x.numel() > _SEQUENTIAL * x.shape[1]:
            x = x.contiguous()
    # Given float32 buffers, the CPU's operator returns float32 statistics for half types, too.
    buffer = x.new_zeros(x.shape[1], dtype=dtype) if on_cpu and dtype != x.dtype else None
    return torch.batch_norm_update_stats(x, buffer, buffer, 0.0)


def _mean_variance_in_blocks(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same of a large tensor in the corrected two-pass algorithm.

    With d = x - s for a shift s near the mean: mean = s + Σd/n and M2 = Σd² - (Σd)²/n, whose
    last term takes back what rounding s left (Chan, Golub and LeVeque, 1983). Without that term
    the variance of 1e3 ± 1e-3 in float32 is off by 9e-4 of itself; with it by 1e-7.
    """
    size = x.numel() // x.shape[1]
    shift = x.sum(_all_but_channels(x), dtype=dtype) / size
    dim, blocks = _blocks([x], [shift])
    sums, squares = [], []
    for rows, shifts in blocks:
        d = rows - shifts
        sums.append(d.sum(dim))
        squares.append(d.square_().sum(dim))
    join = torch.stack if dim == 0 else torch.cat
    total, square = (join(v).view(-1, x.shape[1]).sum(0) for v in (sums, squares))
    m2 = (square - total.square() / size).clamp_(min=0)
    return shift + total / size, m2 / size


def merge_moments(count: Tensor, mean: Tensor, m2: Tensor, dim: int = 0) -> Moments:
    """Pool moments over one dimension of their sets.

    With n = Σ nᵢ: mean = Σ nᵢ/n · meanᵢ and M2 = Σ (M2ᵢ + nᵢ (meanᵢ - mean)²). Empty sets
    contribute nothing whatever their mean holds; pooling only empty sets gives zeros.

    Args:
        count: (..., K, ...) number of values, K at ``dim``, which is not negative.
        mean, m2: the same shape with a channel dimension C appended.
    """
    absent = (count == 0)[..., None]
    return _merge(count, mean.masked_fill(absent, 0.0), m2.masked_fill(absent, 0.0), dim)


def _merge(count: Tensor, mean: Tensor, m2: Tensor, dim: int = 0) -> Moments:
    """The same where mean and M2 of an empty set are 0."""
    total = count.sum(dim, keepdim=True)
    share = (count / total.clamp(min=1))[..., None]
    pooled = (share * mean).sum(dim, keepdim=True)
    spread = mean - pooled
    m2 = torch.addcmul(m2, count[..., None] * spread, spread)
    return Moments(total.squeeze(dim), pooled.squeeze(dim), m2.sum(dim))


def merged(rows: Moments) -> Moments:
    """Pool all rows into one row."""
    return rows if len(rows.count) == 1 else Moments(*(v[None] for v in _merge(*rows)))


def merge_over_ranks(rows: Moments, group: ProcessGroup | None) -> Moments:
    """Pool each of K sets with those of the other ranks: bitwise the same result on every rank."""
    packed = torch.cat([rows.count[:, None], rows.mean, rows.m2], dim=1)
    channels = rows.mean.shape[1]
    count, mean, m2 = all_gather(packed, group).split([1, channels, channels], dim=2)
    return _merge(count[..., 0], mean, m2)


def mix_statistics(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Pool K means and variances (K, C) with equal weights, for statistics of unknown counts."""
    pooled = mean.mean(0)
    return pooled, variance.mean(0) + (mean - pooled).square().mean(0)


def _is_worth_blocks(x: Tensor) -> bool:
    large = x.numel() >= _MANY and x.device.type == "cpu" and x.dim() > 2
    return large and (x.is_contiguous() or _is_channels_last(x))


def _blocks(
    tensors: Sequence[Tensor], channels: Sequence[Tensor]
) -> tuple[int, Iterator[list[Tensor]]]:
    """Go through tensors of one layout by blocks, with (C,) values beside them.

    A block is some rows of the tensors as (N·C, K) if they are contiguous, as (N·K, C) if they are
    channels-last. Also returned is the dimension of a row that has no channels: 1 or 0.
    """
    first, size = tensors[0], tensors[0].shape[1]
    dim = int(first.is_contiguous())
    if dim:
        rows = [t.flatten(2).flatten(0, 1) for t in tensors]
        rows += [c.repeat(len(first))[:, None] for c in channels]
    else:
        rows = [t.permute(0, 2, 3, 1).reshape(-1, size) for t in tensors]
        rows += [c.expand(len(rows[0]), -1) for c in channels]
    step = max(1, torch.get_num_threads() * _BLOCK // rows[0].shape[1])
    starts = range(0, len(rows[0]), step)
    return dim, ([r[i : i + step] for r in rows] for i in starts)


def affine_normalize(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Return weight · (x - mean) / sqrt(variance + eps) + bias of x (N, C, *) in x's type."""
    return fused_normalize(x, weight, bias, mean, variance, False, 0.0, eps)


def exported_normalize(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """As :func:`affine_normalize`, in the one operator that every exporter and counter knows.

    The mean and variance may be None for those of x itself; x may be empty all the same.
    """
    return torch.batch_norm(x, weight, bias, mean, variance, mean is None, 0.0, eps, True)


def fused_normalize(
    x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, train: bool, rate: Any, eps: float
) -> Tensor:
    """Call torch's operator, with ``rate`` as momentum, with types and strides it does right."""
    dtype = statistics_dtype(x.dtype)
    weight, bias, mean, variance = [
        v if v is None or v.dtype == dtype else v.to(dtype) for v in (weight, bias, mean, variance)
    ]
    x = _settled(x)
    y = torch.batch_norm(x, weight, bias, mean, variance, train, rate, eps, False)
    if y.requires_grad and 1 in x.shape and not is_plain(x):
        # its gradient may have such strides, too
        y.register_hook(lambda dy: None if dy is None else _settled(dy))
    return y


def _settled(x: Tensor) -> Tensor:
    """Return x, contiguous if its strides, as (40, 1, 8, 1), are two layouts at once.

    torch's CPU operator then mixes up elements of the input and of the gradient.
    """
    if torch.compiler.is_compiling() or x.is_contiguous() or not _is_channels_last(x):
        return x
    _, c, h, w = x.shape
    return x if x.stride() == (h * w * c, 1, w * c, c) else x.contiguous()


def suits_torch(x: Tensor) -> bool:
    """Return whether torch's operator normalises x by itself, and exactly.

    It divides by zero for a single value per channel. On the CPU it loses digits over many values
    in channels-last format, and rounds sums of half types for some strides.
    """
    size = x.numel() // x.shape[1]
    if size < 2 or x.is_contiguous() or x.device.type != "cpu":
        return size > 1
    wide = x.dtype == statistics_dtype(x.dtype)
    return size <= _SEQUENTIAL and (wide or _is_channels_last(x))


def gradient_sums(
    dy: Tensor, x: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (C,) Σ dy and (C,) Σ dy·x̂ with x̂ = (x - mean) / sqrt(variance + eps)."""
    if x.numel() == 0:  # the fused CPU operator ends the process on an empty tensor
        return torch.zeros_like(mean), torch.zeros_like(mean)
    if is_plain(x):
        dims = _all_but_channels(x)
        dy, centred = dy.to(mean.dtype), x.to(mean.dtype) - broadcast(mean, x)
        return dy.sum(dims), (dy * centred).sum(dims) * (variance + eps).rsqrt()
    if mean.dtype != x.dtype and not (x.is_contiguous() or _is_channels_last(x)):
        x = x.contiguous()  # of other strides the kernel rounds sums to the half type
    # the mean in place of a weight tells it the type to return
    _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
        _like(x, dy), x, mean, mean, variance, None, None, False, eps, [False, True, True]
    )
    return of_bias, of_weight


def _like(x: Tensor, dy: Tensor) -> Tensor:
    """Return dy channels-last or contiguous, as x is."""
    last = _is_channels_last(x) and not x.is_contiguous()
    return dy.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def combine(dy: Tensor, x: Tensor, *channels: Tensor, eps: float) -> Tensor:
    """Return a·dy + b·(x - mean) / sqrt(variance + eps) + c, a new tensor like x (N, C, *).

    The channels are a, b, c, mean and variance, each (C,). Terms of half types may nearly cancel,
    so they are added before anything is rounded.
    """
    a, b, c, mean, variance = channels
    if x.dtype == a.dtype and not is_plain(x):
        return affine_normalize(x, mean, variance, b, c, eps).addcmul_(dy, broadcast(a, dy))
    b = b * (variance + eps).rsqrt()
    if is_plain(x):
        scaled = broadcast(b, x) * (x - broadcast(mean, x)) + broadcast(c, x)
        return (broadcast(a, x) * dy + scaled).to(x.dtype)
    c = torch.addcmul(c, b, mean, value=-1)
    if not _is_worth_blocks(x):
        out = torch.addcmul(broadcast(c, x), x, broadcast(b, x))
        return out.addcmul_(dy, broadcast(a, x)).to(x.dtype)
    out = torch.empty_like(x)
    for rows, dys, outs, *abc in _blocks([x, _like(x, dy), out], [a, b, c])[1]:
        outs.copy_((rows * abc[1]).add_(abc[2]).addcmul_(dys, abc[0]))
    return out
