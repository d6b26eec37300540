"""Bytes a training step holds on to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(forward: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Return the bytes that a forward keeps for its backward, the same on every device.

    Args:
        forward: returns something that keeps the graph alive.
        exclude: tensors that exist anyway, such as parameters. Tensors that share memory count
            once.
    """
    # Storages are held until the end: an address must not be used twice.
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        graph = forward()
    known = {x.untyped_storage().data_ptr() for x in exclude}
    total = sum(s.nbytes() for address, s in storages.items() if address not in known)
    del graph
    return total


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Return how far a step on the GPU raises the memory in use, at its highest."""
    step()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
