"""Writing moments into BatchNorm's buffers: the EMA step and the exact assignment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rethinking_bn.numerics.moments import Moments, is_exporting, is_plain
from rethinking_bn.randomness import is_recomputing


def host_reads(x: Tensor) -> bool:
    """Return whether the host can read ``x`` without waiting for a device."""
    return x.is_cpu and type(x) is Tensor


@torch.no_grad()
def update_running_statistics(
    holders: Sequence[Any], moments: Moments, momentum: float | None
) -> None:
    """Move BatchNorm-like buffers towards moments: one EMA step per row that saw a value.

    With one holder and several rows the steps follow each other, as when one nn.BatchNorm2d is
    called once per level. A row of one value leaves the variance alone. A row that is not finite
    moves nothing: under mixed precision a forward may overflow, and NaN would never leave an
    average again. Nor does a forward that activation checkpointing recomputes.

    Args:
        holders: modules with running_mean, running_var (C,) and num_batches_tracked, which may be
            None unless the momentum is; either one for all K rows, or one per row.
        moments: K rows.
        momentum: fraction of the new value; None: 1 / number of steps so far.
    """
    if is_recomputing():
        return
    (count, mean, m2), first = moments, holders[0]
    alone = len(holders) == len(count) == 1 and momentum is not None and not is_plain(mean)
    if alone and host_reads(mean) and first.running_mean.dtype == mean.dtype:
        n = count.item()
        if n > 0 and m2.max().item() < math.inf:
            first.running_mean.lerp_(mean[0], momentum)
            if n > 1:  # one value has no variance
                first.running_var.lerp_(m2[0] / (n - 1), momentum)
            if first.num_batches_tracked is not None:
                first.num_batches_tracked.add_(1)
        return
    # (2, K): more than 0 values have a mean, more than 1 a variance; M2 shows what is not finite
    seen = (count > torch.arange(2, device=count.device)[:, None]) & (m2.amax(1) < math.inf)
    values = torch.stack([mean, m2 / (count - 1)[:, None]])
    buffers = [h.running_mean for h in holders] + [h.running_var for h in holders]
    counters = [h.num_batches_tracked for h in holders]
    rows = len(holders)  # that move at once
    new = torch.stack(buffers).to(values.dtype).view(2, rows, -1)
    steps = None if momentum is not None else torch.stack(counters)
    for value, ok in zip(values.split(rows, 1), seen.split(rows, 1), strict=True):
        rate: Any = momentum
        if steps is not None:
            steps = steps + ok[0]
            rate = 1 / steps.clamp(min=1).to(values.dtype)[:, None]
        new = torch.where(ok[..., None], new.lerp(value, rate), new)
    counted = seen[0].view(-1, rows).sum(0) if len(count) > rows else seen[0]
    found = [i for i, counter in enumerate(counters) if counter is not None]
    _write(torch._foreach_copy_, Tensor.copy_, buffers, new.flatten(0, 1).unbind())
    _write(
        torch._foreach_add_, Tensor.add_, [counters[i] for i in found], [counted[i] for i in found]
    )


def _write(together: Any, one: Any, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    # torch.func lets nothing else write into a captured tensor; ONNX knows no operator over lists
    if is_exporting():
        for target, source in zip(targets, sources, strict=True):
            one(target, source)
    elif targets:
        together(targets, sources)


def keep_if_finite(holder: Any, old: Tensor, moved: Sequence[Tensor]) -> None:
    """Count a step of torch's operator, or put back old (2, C) where what moved is not finite."""
    largest, counter = moved[1].max(), holder.num_batches_tracked
    pairs = zip(old.unbind(), moved, strict=True)
    # written through aliases: the operator's backward would mind a change of what it was given
    if not host_reads(largest):
        finite = largest < math.inf
        for before, buffer in pairs:
            torch.where(finite, buffer, before, out=buffer.data)
        if counter is not None:
            counter.add_(finite)
    elif not largest.item() < math.inf:
        for before, buffer in pairs:
            buffer.data.copy_(before)
    elif counter is not None:
        counter.add_(1)


@torch.no_grad()
def write_statistics(holders: Sequence[Any], moments: Moments) -> None:
    """Write row after row of moments into BatchNorm-like holders, in place.

    The variance written is the unbiased one. A row without a value leaves its holder alone, a row
    of one value leaves the variance alone. A ValueError unless there are as many rows as holders.
    """
    if len(moments.mean) != len(holders):
        raise ValueError(f"{len(moments.mean)} rows of moments for {len(holders)} domains")
    variance = moments.variance(unbiased=True)
    for row, holder in enumerate(holders):
        mean, var = holder.running_mean, holder.running_var
        count = moments.count[row].to(mean.device)
        mean.copy_(torch.where(count > 0, moments.mean[row].to(mean), mean))
        var.copy_(torch.where(count > 1, variance[row].to(var), var))
