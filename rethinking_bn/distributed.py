"""The few collectives the package uses; every one is the identity without a process group.

``group=None`` means the default process group. All ranks of the group must call these in the
same order with tensors of the same shape and dtype, whatever data they hold.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

#: torch 2.14 renames what older versions call all_gather_into_tensor
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def is_initialized() -> bool:
    """Return whether a default process group exists in this process."""
    return dist.is_available() and dist.is_initialized()


def get_world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of ranks W of ``group``; 1 without a process group.

    Raises:
        ValueError: when this process is no member of ``group``.
    """
    world = dist.get_world_size(group) if is_initialized() else 1
    if world < 1:  # torch's answer to a process outside; its collectives would do nothing there
        raise ValueError("this process is not a member of the process group it was given")
    return world


def get_rank(group: dist.ProcessGroup | None = None) -> int:
    """Return this process's rank within ``group``; 0 without a process group."""
    return dist.get_rank(group) if is_initialized() else 0


def collective_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Return the device on which a small tensor of ours must live to travel through ``group``."""
    if is_initialized() and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return (W, *x.shape), rank r's x at index r: one collective, no wait, no gradient."""
    world = get_world_size(group)
    x = x.detach().contiguous()
    if world == 1:
        return x.unsqueeze(0)
    out = x.new_empty((world * x.numel(),))
    getattr(dist, ALL_GATHER)(out, x.view(-1), group=group)
    return out.view(world, *x.shape)


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum equally shaped tensors over the ranks into a new tensor; ``x`` is left as it was.

    Reducing an expanded tensor in place, as a gradient may be, would write overlapping memory.
    """
    out = x.detach().clone(memory_format=torch.contiguous_format)
    if get_world_size(group) > 1:
        dist.all_reduce(out, group=group)
    return out


_host_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def host_group(group: dist.ProcessGroup | None = None) -> dist.ProcessGroup | None:
    """Return a group of the same ranks whose collectives take tensors on the CPU.

    Numbers that the host waits for travel there: over NCCL it would wait for all earlier work of
    the GPU. A ``group`` that takes CPU tensors, as gloo does, is returned itself. Else a gloo
    group is created on first use, once per group, which is a collective of its ranks.
    """
    if get_world_size(group) == 1:
        return group
    key = group if group is not None else dist.group.WORLD
    assert key is not None  # more than one rank, so there is a default group
    if "cpu:" in dist.get_backend_config(key):
        return group
    if key not in _host_groups:
        ranks = dist.get_process_group_ranks(key)
        made = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup)  # this rank is one of its ranks
        _host_groups[key] = made
    return _host_groups[key]


def gather_numbers(
    numbers: Sequence[int], group: dist.ProcessGroup | None = None
) -> list[list[int]]:
    """Return W lists of equally many 64-bit integers: one collective that waits for no device."""
    mine = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    gathered: list[list[int]] = all_gather(mine, host_group(group)).tolist()
    return gathered


def all_gather_object(obj: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Gather one picklable object per rank: the host waits for the others, not for its device."""
    world = get_world_size(group)
    if world == 1:
        return [obj]
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, obj, group=host_group(group))
    return gathered


def raise_together(error: BaseException | None, group: dist.ProcessGroup | None = None) -> None:
    """Make all ranks fail when one has failed: a collective that every rank must reach.

    Raises:
        BaseException: what went wrong on this rank, where it is not None.
        RuntimeError: on the other ranks, naming the failing ranks and their messages.
    """
    message = None if error is None else f"{type(error).__name__}: {error}"
    failures = {r: m for r, m in enumerate(all_gather_object(message, group)) if m is not None}
    if error is not None:
        raise error
    if failures:
        said = "; ".join(f"rank {rank}: {message}" for rank, message in failures.items())
        raise RuntimeError(f"another rank failed, so this one stops too ({said})")


def all_to_all_rows(
    out: Tensor,
    x: Tensor,
    received: Sequence[int],
    sent: Sequence[int],
    group: dist.ProcessGroup | None = None,
) -> dist.Work | None:
    """Start sending rows from every rank to every rank, as bytes: gloo moves few types.

    Neither tensor may be touched before the returned handle's ``wait()``. One process copies the
    rows at once and returns None.

    Args:
        out: (S, K) contiguous, S the sum of ``received``; filled with the rows that arrive,
            ordered by source.
        x: (R, K) contiguous, of the same type, R the sum of ``sent``; ordered by destination.
        received, sent: W row counts. What rank a sends to b must be what b receives from a.
    """
    if get_world_size(group) == 1:
        out.copy_(x)
        return None
    return dist.all_to_all_single(
        out.view(torch.uint8),
        x.view(torch.uint8),
        list(received),
        list(sent),
        group=group,
        async_op=True,
    )


def data_parallel(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """Wrap a model for data-parallel training in which rank 0's buffers never replace others'.

    Layers of ours agree on statistics by themselves, and those of unsynced BN differ by rank.
    torch's ``broadcast_buffers=False`` did this. torch 2.13 replaces it by
    ``forward_sync_buffers``, which is about forwards only; the start is undone here.

    Args:
        model: on its device, in a process group.
        options: further arguments of DistributedDataParallel.
    """
    if "forward_sync_buffers" not in inspect.signature(DistributedDataParallel).parameters:
        return DistributedDataParallel(model, broadcast_buffers=False, **options)
    own = [buffer.detach().clone() for buffer in model.buffers()]
    wrapped = DistributedDataParallel(model, forward_sync_buffers=False, **options)
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), own, strict=True):
            buffer.copy_(value)
    return wrapped
