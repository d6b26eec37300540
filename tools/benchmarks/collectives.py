"""Collectives of a training step of the RetinaNet head with synchronised BatchNorm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.equality import ResultsDiffer
from benchmarks.levels import TOY_SIZES, make_levels
from benchmarks.result import Result
from benchmarks.timing import Options, alternate, missing
from machine.processes import run_processes
from rethinking_bn.layers import SyncBatchNorm2d

_WORLD = 2
_SMALL_SIZES = ((24, 32), (12, 16), (6, 8), (3, 4), (2, 2))
_COUNTED = (
    *("all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce"),
    *("all_to_all_single", "all_gather_object", "broadcast_object_list"),
)


def run(options: Options, per_level: type[nn.Module] | None = None) -> Result:
    """Count them on two processes, 8 norm layers and 5 levels, and compare the steps.

    Args:
        per_level: the BatchNorm that the other side calls once per level; None:
            nn.SyncBatchNorm on GPUs and, as that refuses CPU tensors, ours on CPUs.
    """
    result = Result("collectives")
    if (reason := missing("detectron2")) is not None:
        result.skip("everything", reason)
        return result
    device = options.device_for(_WORLD)
    if per_level is None:
        per_level = nn.SyncBatchNorm if device.type == "cuda" else SyncBatchNorm2d
    sizes = options.pick(quick=TOY_SIZES, cpu=_SMALL_SIZES, cuda=_SMALL_SIZES)
    channels = options.pick(quick=8, cpu=32, cuda=256)
    args = (sizes, channels, options, per_level)
    answer = run_processes(_measure, _WORLD, *args, device=device, expected=ResultsDiffer)[0]
    result.checks.update(answer["checks"])
    ours, other = "MultiDomainBatchNorm2d", f"CycleBatchNormList of {per_level.__name__}"
    counts = answer["counts"]
    for kind in sorted({*counts[0], *counts[1]}):
        pair = [(side, [float(c[kind])]) for side, c in zip((ours, other), counts, strict=True)]
        result.measure(f"{kind} per step", pair[0], pair[1], unit="", scale=1.0)
    times, case = answer["times"], f"step, {_WORLD} processes, {device.type}"
    result.measure(case, (ours, times["ours"]), (other, times["other"]))
    return result


@contextmanager
def _counting() -> Iterator[Counter[str]]:
    """Count this process's collectives while the context is open, by kind."""
    counts: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in _COUNTED if hasattr(dist, name)}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name.removesuffix("_into_tensor").removesuffix("_single")] += 1
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in originals:
            setattr(dist, name, counted(name))
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _measure(
    device: torch.device, sizes: Any, channels: int, options: Options, per_level: type[nn.Module]
) -> dict[str, Any]:
    """Run on one rank: check, count, time."""
    from benchmarks import heads

    rank = dist.get_rank()
    size = heads.HeadSize(channels, 4, 2, 1)
    ours = heads.our_head(size, 4, norm="SyncBN").to(device)
    other = heads.per_level_head(size, per_level).to(device)
    # ranks hold different values
    levels = make_levels(sizes, channels, device=device)
    features = [(x.detach() * (1 + rank) + rank).requires_grad_() for x in levels.xs]
    pair = f"one collective = one per level ({per_level.__name__})"
    checks = {pair: heads.check_heads(pair, ours, other, features)}
    dys = heads.output_gradients(ours, features)
    counts = []
    for head in (ours, other):
        with _counting() as of_head:
            heads.head_step(head, features, dys)
        counts.append(of_head)
    sides = {"ours": ours, "other": other}
    steps = {name: partial(heads.head_step, head, features, dys) for name, head in sides.items()}
    times = alternate(steps, options, 6.0, together=device)
    return {"checks": checks, "counts": counts, "times": times}
