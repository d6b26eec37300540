"""Working through a large tensor on the CPU in blocks that a core's cache holds.

Temporaries of the tensor's size would be fetched from memory, and paged in, for every operator.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# From so many values, in planes (H·W) of so many, blocks pay for the loop over them.
MANY, _PLANE = 2**16, 16
_BLOCK = 2**18  # values for a thread: 1 MiB of float32


def worth_blocks(x: Tensor) -> bool:
    """Whether x (N, C, *) is on the CPU, contiguous and large, and nothing is being compiled."""
    if x.device.type != "cpu" or x.dim() < 3 or x.numel() < MANY or not x.is_contiguous():
        return False
    return x[0, 0].numel() >= _PLANE and not torch.compiler.is_compiling()


def is_channels_last(x: Tensor) -> bool:
    """Whether x is 4-d and in channels-last format; it may be contiguous as well."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def planes(x: Tensor) -> Tensor:
    """View contiguous (N, C, *) as (N·C, K), one row a channel of an image."""
    return x.flatten(2).flatten(0, 1)


def per_plane(channels: Tensor, images: int) -> Tensor:
    """Return (C,) values as (N·C, 1), beside the rows of :func:`planes`."""
    return channels.repeat(images)[:, None]


def _rows_of_a_block(rows: Tensor) -> int:
    return max(1, torch.get_num_threads() * _BLOCK // rows.shape[1])


def blocks(rows: Tensor) -> Iterator[slice]:
    """Yield slices of consecutive rows, each of about a block."""
    step = _rows_of_a_block(rows)
    for start in range(0, len(rows), step):
        yield slice(start, min(start + step, len(rows)))


def block_buffer(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised buffer for any of the :func:`blocks`, its leading rows to be used."""
    step = _rows_of_a_block(rows)
    return rows.new_empty(min(step, len(rows)), rows.shape[1], dtype=dtype)
