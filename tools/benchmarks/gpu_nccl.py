"""The collectives of synchronised layers over NCCL, as far as one GPU shows them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.contenders import FPN_SIZES, TOY_SIZES, make_levels, multi_domain
from benchmarks.equality import require_equal, tolerance_of
from benchmarks.options import Options
from benchmarks.result import Result
from benchmarks.timing import synchronizes_host
from rethinking_bn.numerics import normalize, normalize_function


def check_nccl(result: Result, options: Options) -> None:
    """The synchronised layers in an NCCL group of one rank; more ranks need more GPUs."""
    if options.device.type != "cuda":
        return result.skip("NCCL", "needs CUDA")
    if dist.is_initialized():
        return result.skip("NCCL", "a process group exists already")
    sizes = TOY_SIZES if options.quick else FPN_SIZES
    levels = make_levels(sizes, 2 if options.quick else 256, device=options.device)
    plain, synced = (multi_domain("row 1", levels) for _ in range(2))
    module: Any = synced.module
    module.sync = True
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl",
            init_method=f"file://{folder}/init",
            rank=0,
            world_size=1,
            timeout=timedelta(seconds=60),
        )
        try:
            with _collectives_of_one_rank():
                ours, other = synced.step(), plain.step()
                waits = synchronizes_host(synced.step)
            for i, kind in enumerate(("outputs", "gradients")):
                label = f"one rank of NCCL = no group, {kind}"
                tolerance = tolerance_of(torch.float32)
                result.checks[label] = require_equal(label, ours[i], other[i], tolerance)
            if waits:
                result.failures.append("NCCL, one rank: the host waits in a step")
        finally:
            dist.destroy_process_group()


@contextmanager
def _collectives_of_one_rank() -> Iterator[None]:
    """Make synchronised layers send what they skip sending where there is nobody else."""

    def gather(x: Tensor, group: Any) -> Tensor:
        out = torch.empty_like(x)
        dist.all_gather_into_tensor(out.view(-1), x.contiguous().view(-1), group=group)
        return out[None]

    def add(x: Tensor, group: Any) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=group)
        return out

    from rethinking_bn.numerics.triton import batch_norm  # imports Triton

    with ExitStack() as stack:
        for module, name, value in (
            (normalize, "get_world_size", lambda group=None: 2),
            *((module, "all_gather", gather) for module in (normalize, batch_norm)),
            *((module, "all_reduce_sum", add) for module in (normalize_function, batch_norm)),
        ):
            stack.enter_context(patch.object(module, name, value))
        yield
