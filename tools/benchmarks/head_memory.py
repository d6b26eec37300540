"""What every variant of the RetinaNet head keeps in memory for one image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import FPN_SIZES, TOY_SIZES, make_levels
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.options import Options
from benchmarks.result import Result, Table
from benchmarks.retinanet_heads import (
    ROWS,
    HeadSize,
    detectron2_head,
    head_forward,
    head_step,
    our_head,
)


def add_memory(result: Result, size: HeadSize, options: Options) -> None:
    """Tabulate it: bytes saved for the backward, and on a GPU the peak of a step."""
    sizes = options.pick(quick=TOY_SIZES, cpu=FPN_SIZES, cuda=FPN_SIZES)
    xs = make_levels(sizes, size.channels, images=1, device=options.device).xs
    groups = 32 if size.channels % 32 == 0 else 4
    heads = {
        "no norm": detectron2_head(size),
        "detectron2, BN": detectron2_head(size, "BN"),
        f"detectron2, GN of {groups} groups": detectron2_head(
            size, lambda channels: nn.GroupNorm(groups, channels)
        ),
        **{f"ours, row {row}": our_head(size, row) for row in ROWS},
    }
    columns: tuple[str, ...] = ("head", "MiB saved for backward")
    on_gpu = options.device.type == "cuda"
    if on_gpu:
        columns += ("MiB at the peak of a step",)
    rows: list[tuple[str | int | float, ...]] = []
    for name, head in heads.items():
        head.to(options.device)
        with torch.no_grad():
            dys = [torch.ones_like(y) for y in head_forward(head, xs)]

        def forward(head: nn.Module = head) -> Any:
            return head_forward(head, xs)

        def step(head: nn.Module = head, dys: list[Tensor] = dys) -> Any:
            return head_step(head, xs, dys)

        row: tuple[str | int | float, ...] = (
            name,
            saved_bytes(forward, [*head.parameters(), *xs]) / 2**20,
        )
        rows.append((*row, peak_bytes(step, options.device) / 2**20) if on_gpu else row)
    result.tables.append(Table("Memory per image", columns, rows))
