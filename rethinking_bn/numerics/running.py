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
    variance = moments.variance(unbiased=True)
    first = holders[0]
    if len(holders) == len(moments.count) == 1 and momentum is not None and not is_plain(variance):
        if host_reads(variance) and first.running_mean.dtype == variance.dtype:
            n = moments.count.item()
            if n > 0 and variance.max().item() < math.inf:
                first.running_mean.lerp_(moments.mean[0], momentum)
                if n > 1:  # one value has no variance
                    first.running_var.lerp_(variance[0], momentum)
                if first.num_batches_tracked is not None:
                    first.num_batches_tracked.add_(1)
            return
    finite = variance.amax(1) < math.inf  # (K,); what is not finite leaves a variance that is not
    values = torch.stack([moments.mean, variance]).where(finite[:, None], 0.0)  # (2, K, C)
    seen = torch.stack([moments.count > 0, moments.count > 1]) & finite  # (2, K)
    buffers = [h.running_mean for h in holders] + [h.running_var for h in holders]
    old = torch.stack(buffers).to(values.dtype).view(2, len(holders), -1)
    counters = [h.num_batches_tracked for h in holders]
    sequential = len(holders) == 1 and seen.shape[1] > 1
    if momentum is None:
        steps = seen[0].cumsum(0) if sequential else seen[0].long()
        rate = seen / (torch.stack(counters) + steps).clamp(min=1).to(values.dtype)
    else:
        rate = seen.to(values.dtype) * momentum
    counted = seen[0].long()
    # K steps in one: new = Π (1 - rateₖ) · old + Σ rateₖ · Π_{j>k} (1 - rateⱼ) · valueₖ
    if sequential:
        keep = (1 - rate).flip(1).cumprod(1).flip(1)  # Π_{j≥k}
        rate = rate * torch.cat([keep[:, 1:], torch.ones_like(keep[:, :1])], dim=1)
        new = old * keep[:, :1, None] + (values * rate[..., None]).sum(1, keepdim=True)
        counted = counted.sum(0, keepdim=True)
    else:
        new = old.lerp(values, rate[..., None])
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


def keep_if_finite(holder: Any, old: Sequence[Tensor], moved: Sequence[Tensor]) -> None:
    """Write what torch's operator moved into the holder's old mean and variance (C,), if finite."""
    if is_recomputing():
        return
    (old_mean, old_variance), (mean, variance) = old, moved
    largest, counter = variance.max(), holder.num_batches_tracked
    if not host_reads(largest):
        finite = largest < math.inf
        torch.where(finite, mean, old_mean, out=old_mean)
        torch.where(finite, variance, old_variance, out=old_variance)
        if counter is not None:
            counter.add_(finite)
    elif largest.item() < math.inf:
        old_mean.copy_(mean)
        old_variance.copy_(variance)
        if counter is not None:
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
