"""Writing moments into BatchNorm's buffers: the EMA step and the exact assignment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rethinking_bn.numerics.batch_statistics import BatchStatistics
from rethinking_bn.numerics.moments import Moments


def update_running_statistics(
    holders: Sequence[Any], seen: Moments | BatchStatistics, momentum: float | None
) -> None:
    """Move BatchNorm-like buffers towards what was seen: one EMA step per row that saw a value.

    With one holder and several rows the steps follow each other, row after row, as when one
    nn.BatchNorm2d is called once per level. Rows are skipped on the device, without a host
    synchronisation: those without a value entirely, those with one value for the variance. A row
    that is not finite is skipped as well: under mixed precision one forward may overflow, in a
    step that the optimizer then leaves out, and NaN would never leave a moving average again.

    Args:
        holders: modules with running_mean, running_var (C,) and num_batches_tracked, which may be
            None unless the momentum is; either one for all K rows, or one per row.
        seen: K rows; of a batch, without gradient.
        momentum: fraction of the new value; None: 1 / number of steps so far.
    """
    if isinstance(seen, Moments):
        _update_on_device(holders, seen, momentum)
        return
    alike = all(h.running_mean.dtype == seen.values[0].dtype for h in holders)
    if momentum is not None and alike and len(holders) == len(seen.counts) == 1:
        _update_one(holders[0], seen, momentum)
    elif momentum is not None and alike and len(holders) == len(seen.counts):
        _update_each(holders, seen, momentum)
    else:
        _update_on_device(holders, seen.moments(), momentum)


def host_reads(x: Tensor) -> bool:
    """Return whether a value of ``x`` is at hand: on the CPU, where nothing records operators."""
    if x.device.type != "cpu" or type(x) is not Tensor:
        return False
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def _update_one(holder: Any, seen: BatchStatistics, momentum: float) -> None:
    """One row and its holder."""
    (mean, variance), (n,) = seen.values, seen.counts
    mean, variance = mean.view(-1), variance.view(-1)
    if not seen.is_unbiased:
        variance = variance * seen.factors()[0]
    largest, counter = variance.max(), holder.num_batches_tracked
    if host_reads(largest):
        if largest.item() < math.inf and n:
            holder.running_mean.lerp_(mean, momentum)
            if n > 1:  # one value has no variance
                holder.running_var.lerp_(variance, momentum)
            if counter is not None:
                counter.add_(1)
        return
    finite = largest < math.inf
    for buffer, value, least in ((holder.running_mean, mean, 1), (holder.running_var, variance, 2)):
        if n >= least:
            torch.where(finite, torch.lerp(buffer, value, momentum), buffer, out=buffer)
    if n and counter is not None:
        counter.add_(finite)


def _update_each(holders: Sequence[Any], seen: BatchStatistics, momentum: float) -> None:
    """One row a holder: all buffers in one operator, what has no value left out by the host."""
    counts, values = seen.counts, seen.unbiased()
    # an input that is not finite leaves a variance that is not
    finite = values[1].amax(1) < math.inf  # (K,)
    buffers = [h.running_mean for h in holders] + [h.running_var for h in holders]
    old = torch.stack(buffers).view(values.shape)
    new = torch.where(finite[:, None], values, old).flatten(0, 1).unbind()
    moving = [i for i, n in enumerate((*counts, *counts)) if n > (0 if i < len(counts) else 1)]
    if moving:
        torch._foreach_lerp_([buffers[i] for i in moving], [new[i] for i in moving], momentum)
    _count(
        [h.num_batches_tracked for h, n in zip(holders, counts, strict=True) if n],
        [step for step, n in zip(finite.unbind(), counts, strict=True) if n],
    )


@torch.no_grad()
def _update_on_device(holders: Sequence[Any], moments: Moments, momentum: float | None) -> None:
    """The same for counts that only the device knows, and for steps that follow each other."""
    values = torch.stack([moments.mean, moments.variance(unbiased=True)])  # (2, K, C)
    # x·0 is NaN for what is not finite, so that a row's sum tells
    finite = (values * 0).sum((0, 2)) == 0  # (K,)
    values = values.where(finite[:, None], 0.0)
    seen = torch.stack([moments.count > 0, moments.count > 1]) & finite  # (2, K): mean, variance
    buffers = [h.running_mean for h in holders] + [h.running_var for h in holders]
    old = torch.stack(buffers).to(values.dtype).view(2, len(holders), -1)
    counters = [h.num_batches_tracked for h in holders]
    sequential = len(holders) == 1 and seen.shape[1] > 1
    if momentum is None:
        steps = seen[0].cumsum(0) if sequential else seen[0].long()
        rate = seen / (torch.stack(counters) + steps).clamp(min=1).to(values.dtype)
    else:
        rate = seen.to(values.dtype) * momentum
    if sequential:
        rate, remains = _sequential_rates(rate)
        new = old * remains[:, None, None] + (values * rate[..., None]).sum(1, keepdim=True)
    else:
        new = old.lerp(values, rate[..., None])
    _each(torch._foreach_copy_, Tensor.copy_, buffers, new.flatten(0, 1))
    counted = seen[0].sum(0, keepdim=True) if sequential else seen[0].long()
    _count(counters, list(counted))


def _count(counters: list[Tensor | None], steps: list[Tensor]) -> None:
    pairs = [(c, s) for c, s in zip(counters, steps, strict=True) if c is not None]
    if pairs:
        _each(torch._foreach_add_, Tensor.add_, *zip(*pairs, strict=True))


def _each(together: Any, one: Any, targets: Sequence[Tensor], sources: Iterable[Tensor]) -> None:
    if torch.compiler.is_exporting():  # ONNX knows no operator over lists
        for target, source in zip(targets, sources, strict=True):
            one(target, source)
    else:
        together(list(targets), list(sources))


def _sequential_rates(rate: Tensor) -> tuple[Tensor, Tensor]:
    """Fold K EMA steps into one: new = remains · old + Σ rate'ₖ · valueₖ.

    Args:
        rate: (2, K) rates of the steps, the first step first.

    Returns:
        rate' (2, K) = rateₖ · Π_{j>k} (1 - rateⱼ), and remains (2,) = Π (1 - rateⱼ).
    """
    keep = (1 - rate).flip(1).cumprod(1).flip(1)  # Π_{j≥k}
    after = torch.cat([keep[:, 1:], torch.ones_like(keep[:, :1])], dim=1)
    return rate * after, keep[:, 0]


@torch.no_grad()
def write_statistics(holders: Sequence[Any], moments: Moments) -> None:
    """Write row after row of moments into BatchNorm-like holders, in place.

    The variance written is the unbiased one. A row without a value leaves its holder alone, a row
    of one value leaves the variance alone.

    Raises:
        ValueError: unless there are as many rows as holders.
    """
    if len(moments.mean) != len(holders):
        raise ValueError(f"{len(moments.mean)} rows of moments for {len(holders)} domains")
    variance = moments.variance(unbiased=True)
    for row, holder in enumerate(holders):
        mean, var = holder.running_mean, holder.running_var
        count = moments.count[row].to(mean.device)
        mean.copy_(torch.where(count > 0, moments.mean[row].to(mean), mean))
        var.copy_(torch.where(count > 1, variance[row].to(var), var))
