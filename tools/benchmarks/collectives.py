"""Collectives of a training step of the RetinaNet head with synchronised BatchNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.comparators.batch_norm import PlainSyncBatchNorm2d
from benchmarks.contenders import TOY_SIZES, make_levels
from benchmarks.equality import ResultsDiffer
from benchmarks.options import Options, missing
from benchmarks.processes import alternate_together
from benchmarks.result import Result
from benchmarks.timing import Plan
from benchmarks.traffic import counting_traffic
from studies.processes import run_processes

_SMALL_SIZES = ((24, 32), (12, 16), (6, 8), (3, 4), (2, 2))


def run(options: Options, per_level: type[nn.Module] | None = None) -> Result:
    """Count them on two processes, 8 norm layers and 5 levels, and compare the steps.

    Args:
        per_level: the BatchNorm that the other side calls once per level; None:
            nn.SyncBatchNorm on GPUs and a plain one of the same kind on CPUs.
    """
    result = Result("collectives")
    reason = missing("detectron2")
    if reason:
        result.skip("everything", reason)
    else:
        _compare(result, options, per_level)
    return result


def _compare(result: Result, options: Options, per_level: type[nn.Module] | None) -> None:
    world = 2
    device = options.device_for(world)
    if per_level is None:
        per_level = nn.SyncBatchNorm if device.type == "cuda" else PlainSyncBatchNorm2d
    sizes = options.pick(quick=TOY_SIZES, cpu=_SMALL_SIZES, cuda=_SMALL_SIZES)
    channels = options.pick(quick=8, cpu=32, cuda=256)
    plan = options.plan(6.0)
    answers = run_processes(
        _measure, world, sizes, channels, plan, per_level, device=device, expected=ResultsDiffer
    )
    answer = answers[0]
    result.checks.update(answer["checks"])
    other = f"CycleBatchNormList of {per_level.__name__}"
    ours = "MultiDomainBatchNorm2d"
    for kind in ("all_gather", "all_reduce"):
        pair = [
            (side, [float(answer["calls"][index].get(kind, 0))])
            for index, side in enumerate((ours, other))
        ]
        result.measure(f"{kind} per step", pair[0], pair[1], unit="", scale=1.0)
    sent = [(side, [answer["sent"][index]]) for index, side in enumerate((ours, other))]
    result.measure("sent per rank and step", sent[0], sent[1], unit="KiB", scale=1 / 1024)
    times = answer["times"]
    result.measure(
        f"step, {world} processes, {device.type}", (ours, times["ours"]), (other, times["other"])
    )
    extra = {k: n for k, n in answer["calls"][0].items() if k not in ("all_gather", "all_reduce")}
    result.notes.append(f"other collectives of ours: {extra or 'none'}")


def _measure(
    device: torch.device, sizes: Any, channels: int, plan: Plan, per_level: type[nn.Module]
) -> dict[str, Any]:
    """Run on one rank: check, count, time."""
    from benchmarks.head_check import check_heads, output_gradients
    from benchmarks.retinanet_heads import HeadSize, head_step, our_head, per_level_head

    rank = torch.distributed.get_rank()
    size = HeadSize(channels, 4, 2, 1)
    ours = our_head(size, 4, norm="SyncBN").to(device)
    other = per_level_head(size, per_level).to(device)
    # ranks hold different values
    levels = make_levels(sizes, channels, device=device)
    features = [(x.detach() * (1 + rank) + rank).requires_grad_() for x in levels.xs]
    pair = f"one collective = one per level ({per_level.__name__})"
    checks = {pair: check_heads(pair, ours, other, features)}
    dys = output_gradients(ours, features)
    calls, sent = [], []
    for head in (ours, other):
        with counting_traffic() as traffic:
            head_step(head, features, dys)
        calls.append(dict(traffic.calls))
        sent.append(traffic.sent)
    times = alternate_together(
        {
            "ours": lambda: head_step(ours, features, dys),
            "other": lambda: head_step(other, features, dys),
        },
        device,
        plan,
    )
    return {"checks": checks, "calls": calls, "sent": sent, "times": times}
