"""How a launch is laid out: tiles, their table on the device, block sizes; one plan per shapes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Values of a block, which a program holds in registers; blocks of a tile at most. A block is the
# compiler's, so the numbers are powers of two.
BLOCK, BLOCKS = 4096, 4
CHANNELS_LAST_BYTES = 128  # of neighbouring channels that a channels-last block spans
#: Up to so many tiles, the programs that need merged rows merge them themselves.
FOLD = 32
WARPS = 8


class Plan(NamedTuple):
    """What the launches on tensors of some shapes have in common.

    Attributes:
        channels: C.
        groups: K, tensors, or row groups of the only tensor.
        tiles: T, rows that the tiles write; 0 when every tensor is empty.
        table: int64 on the device, flat. For every tile group, whether it is the group's first,
            planes, positions, offset of its first element (channels-last: its first position), size
            of a plane; then for every group its first tile and its number of tiles.
        listed: tiles in the table, one at least.
        last: whether tensors are channels-last.
        grid: programs of a launch that writes features.
        folded: whether consumers merge the tiles' rows themselves.
        block: what launches on features are told: LAST; ALIGN, a power of two that divides every
            offset a contiguous block can start at; ROWS and COLUMNS of a block, planes and
            positions, or in channels-last positions and channels; the warps of a program.
    """

    channels: int
    groups: int
    tiles: int
    table: Tensor
    listed: int
    last: bool
    grid: tuple[int, int]
    folded: bool
    block: dict[str, Any]


def power_of_two(value: int) -> int:
    """Return the smallest power of two that is at least ``value``, and 1."""
    return 1 << max(value - 1, 0).bit_length()


@lru_cache(maxsize=1024)
def make_plan(
    shapes: tuple[tuple[int, ...], ...],
    row_groups: tuple[int, ...] | None,
    last: bool,
    itemsize: int,
    device: torch.device,
) -> Plan:
    """Return the plan for tensors (N, C, *) of these shapes.

    Args:
        row_groups: rows of each group of the only tensor; None: a tensor is a group.
        last: channels-last rather than contiguous.
        itemsize: bytes of a value.
    """
    channels = shapes[0][1]
    sizes = [_size(shape[2:]) for shape in shapes]
    images = [shape[0] for shape in shapes]
    starts = [0] * len(shapes)
    if row_groups is not None:
        images, sizes = list(row_groups), sizes * len(row_groups)
        starts = [sum(images[:i]) for i in range(len(images))]
    if last:
        columns = min(CHANNELS_LAST_BYTES // itemsize, max(16, power_of_two(channels)))
        align = 1
    else:
        columns = min(BLOCK, power_of_two(max(sizes, default=1)))
        align = gcd(16, *sizes)
    rows = BLOCK // columns
    tiles: list[tuple[int, ...]] = []
    spans: list[tuple[int, int]] = []
    for group, (n, size, start) in enumerate(zip(images, sizes, starts, strict=True)):
        first = len(tiles)
        for tile in _tiles_of(n, size, channels, last, rows, columns):
            planes, positions, offset = tile
            head = (group, int(len(tiles) == first), planes, positions)
            tiles.append((*head, offset + start * size * (1 if last else channels), size))
        spans.append((first, len(tiles) - first))
    number = len(tiles)
    if not tiles:
        tiles = [(0, 1, 0, 0, 0, 0)]
    flat = [value for row in (*tiles, *spans) for value in row]
    return Plan(
        channels,
        len(images),
        number,
        _on_device(flat, device),
        len(tiles),
        last,
        (len(tiles), -(-channels // columns) if last else channels),
        number <= FOLD,
        {"LAST": last, "ALIGN": align, "ROWS": rows, "COLUMNS": columns, "num_warps": WARPS},
    )


def _size(spatial: Sequence[int]) -> int:
    size = 1
    for length in spatial:
        size *= length
    return size


def _tiles_of(
    images: int, size: int, channels: int, last: bool, rows: int, columns: int
) -> list[tuple[int, int, int]]:
    """Cut a group into tiles: (planes, positions, offset as in the table)."""
    if images * size == 0:
        return []
    if last:
        return [(1, stop - start, start) for start, stop in _cut(images * size, BLOCKS * rows, 16)]
    if size > columns:
        return [
            (1, stop - start, image * channels * size + start)
            for image in range(images)
            for start, stop in _cut(size, BLOCKS * columns, 16)
        ]
    return [
        (stop - start, size, start * channels * size)
        for start, stop in _cut(images, BLOCKS * rows, 1)
    ]


def _cut(number: int, longest: int, multiple: int) -> list[tuple[int, int]]:
    """Cut a range into equal stretches (start, stop), starts being multiples."""
    pieces = -(-number // longest)
    length = -(-number // (pieces * multiple)) * multiple
    return [(start, min(start + length, number)) for start in range(0, number, length)]


def _on_device(values: list[int], device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    # from pinned memory the copy does not make the host wait
    pinned = torch.tensor(values, dtype=torch.int64, pin_memory=True)
    return pinned.to(device, non_blocking=True)
