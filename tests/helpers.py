"""What tests of several rooms use."""

from __future__ import annotations

import contextlib
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from machine.processes import run_processes

# Of several tests that start processes most need these; without detectron2 two are left out.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    [f"rethinking_bn.{room}" for room in ("layers", "modeling", "engine")]
)


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 90
) -> list[Any]:
    """Call ``fn(rank, *args)`` on gloo processes; the rest is as ``run_processes`` says."""
    return run_processes(_with_rank, world_size, fn, args, timeout=timeout)


def _with_rank(device: torch.device, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return fn(dist.get_rank(), *args)


@contextlib.contextmanager
def tracer_warnings_ignored() -> Iterator[None]:
    """Ignore what torch says of every trace: checks in Python are not part of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield
