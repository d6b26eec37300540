"""Collectives of a step, counted where they are called, and the bytes they send."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """What this rank did in the counted region.

    Attributes:
        calls: name of the collective -> how often; the variants of one have one name.
        sent: bytes this rank sends in sum, by the usual ring algorithms: (W - 1) · n for an
            all_gather of n bytes a rank, 2 (W - 1) / W · n for an all_reduce of n bytes, what is
            addressed to others for an all_to_all.
    """

    calls: Counter[str] = field(default_factory=Counter)
    sent: float = 0.0


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _gathered(world: int, args: Any, kwargs: Any) -> float:
    x = args[1] if len(args) > 1 else kwargs.get("input_tensor", kwargs.get("tensor"))
    return (world - 1) * _size(x)


def _reduced(world: int, args: Any, kwargs: Any) -> float:
    x = args[0] if args else kwargs["tensor"]
    return 2 * (world - 1) / world * _size(x)


def _exchanged(world: int, args: Any, kwargs: Any) -> float:
    x = args[1] if len(args) > 1 else kwargs["input"]
    splits = args[3] if len(args) > 3 else kwargs.get("input_split_sizes")
    if not splits:
        return (world - 1) / world * _size(x)
    row = _size(x) / max(len(x), 1)
    return (sum(splits) - splits[dist.get_rank()]) * row


def _objects(world: int, args: Any, kwargs: Any) -> float:
    return 0.0  # counted, so that none is hidden; its pickled bytes are not known here


_COUNTED: dict[str, tuple[str, Callable[[int, Any, Any], float]]] = {
    "all_gather": ("all_gather", _gathered),
    "all_gather_into_tensor": ("all_gather", _gathered),
    "all_reduce": ("all_reduce", _reduced),
    "all_to_all_single": ("all_to_all", _exchanged),
    "all_gather_object": ("all_gather_object", _objects),
    "broadcast_object_list": ("broadcast_object", _objects),
}


@contextmanager
def counting_traffic() -> Iterator[Traffic]:
    """Count this process's collectives on the default group while the context is open."""
    traffic = Traffic()
    world = dist.get_world_size()
    originals = {name: getattr(dist, name) for name in _COUNTED}

    def counted(function: str) -> Callable[..., Any]:
        name, bytes_of = _COUNTED[function]

        def call(*args: Any, **kwargs: Any) -> Any:
            traffic.calls[name] += 1
            traffic.sent += bytes_of(world, args, kwargs)
            return originals[function](*args, **kwargs)

        return call

    try:
        for function in _COUNTED:
            setattr(dist, function, counted(function))
        yield traffic
    finally:
        for function, original in originals.items():
            setattr(dist, function, original)
