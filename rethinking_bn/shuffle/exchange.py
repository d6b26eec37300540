"""Send rows between ranks as :mod:`.permutation` has planned it, without autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rethinking_bn.distributed import all_to_all_rows
from rethinking_bn.shuffle.permutation import Exchange

# Rows are moved as numbers of the largest of these sizes that their bytes divide into: the bits
# arrive, whatever they mean, and fewer numbers are gathered faster.
_CARRIERS = {
    16: torch.complex128,
    8: torch.int64,
    4: torch.int32,
    2: torch.int16,
    1: torch.uint8,
}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def exchange_rows(
    x: Tensor, exchange: Exchange, channels_last: bool, group: ProcessGroup | None
) -> Tensor:
    """Return (S, ...), the rows of all ranks' (R, ...) as ``exchange`` distributes them."""
    shape = (len(exchange.place), *x.shape[1:])
    channels_last = channels_last and x.dim() in _CHANNELS_LAST
    memory_format = _CHANNELS_LAST[x.dim()] if channels_last else torch.contiguous_format
    # Written through views: the result must not itself be one, or autograd would forbid the
    # caller to change it in place.
    result = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    source, target = _as_rows(x, channels_last), _as_rows(result, channels_last)
    carrier = _carrier(source, target)
    source, target = source.view(carrier), target.view(carrier)
    if len(exchange.sent) == 1:
        torch.index_select(source, 0, exchange.order[exchange.place], out=target)
        return result
    leaving, arriving = sum(exchange.sent), sum(exchange.received)
    packed = source.index_select(0, exchange.order[:leaving])
    arrived = source.new_empty((len(exchange.place), source.shape[1]))
    work = all_to_all_rows(arrived[:arriving], packed, exchange.received, exchange.sent, group)
    torch.index_select(source, 0, exchange.order[leaving:], out=arrived[arriving:])
    if work is not None:
        work.wait()
    torch.index_select(arrived, 0, exchange.place, out=target)
    return result


def _as_rows(x: Tensor, channels_last: bool) -> Tensor:
    """View (R, ...) as (R, K), a row in the order it is stored; copied where that has no view."""
    rows, columns = len(x), math.prod(x.shape[1:])
    return (x.movedim(1, -1) if channels_last else x).reshape(rows, columns)


def _carrier(*matrices: Tensor) -> torch.dtype:
    """Return the widest type as which the rows of all these matrices (R, K) can be viewed."""
    element = matrices[0].element_size()
    for size, carrier in _CARRIERS.items():
        if size == element or all(_can_be_viewed(m, size // element) for m in matrices):
            return carrier
    return matrices[0].dtype


def _can_be_viewed(matrix: Tensor, elements: int) -> bool:
    """Whether ``elements`` neighbours in every row can be read as one number."""
    lengths = (matrix.shape[1], matrix.stride(0), matrix.storage_offset())
    if elements < 2 or not matrix.numel() or matrix.stride(1) != 1:
        return False
    return all(length % elements == 0 for length in lengths)


def layout_vote(x: Tensor) -> int:
    """Return 2 if ``x`` is channels-last, 1 if it is not, 0 if it has no say (it may be both)."""
    last = _CHANNELS_LAST.get(x.dim())
    if x.numel() == 0 or last is None:
        return 0
    is_last = x.is_contiguous(memory_format=last)
    return 0 if is_last and x.is_contiguous() else 1 + is_last
