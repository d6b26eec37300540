"""Properties of shuffle_rows that must hold for any row counts on 1 to 4 processes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rethinking_bn.layers import shuffle_rows, unshuffle_rows
from tests.helpers import run_distributed

_KINDS = [torch.float32, torch.bfloat16, torch.int64]


def _rows(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    """Rows that tell where they come from: rank and number, within what bfloat16 holds."""
    numbers = 16 * rank + torch.arange(count)
    return numbers[:, None, None].expand(-1, 2, 3).to(dtype).contiguous()


def _there_and_back(
    rank: int, counts: list[int], seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return the rows received, those that came back, and a gradient with its expected value."""
    x = _rows(rank, counts[rank], dtype).requires_grad_(dtype.is_floating_point)
    rows, state = shuffle_rows(x, generator_seed=seed)
    back = unshuffle_rows(rows, state)
    upstream = _rows(rank + 4, counts[rank], dtype)
    if dtype.is_floating_point:
        back.backward(upstream)
    return rows.detach(), back.detach(), x.grad, upstream


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    seed=st.integers(-(2**40), 2**70),
    dtype=st.sampled_from(_KINDS),
)
def test_there_and_back_for_any_row_counts(
    counts: list[int], seed: int, dtype: torch.dtype
) -> None:
    ranks = run_distributed(_there_and_back, len(counts), counts, seed, dtype)
    received = [rows for rows, *_ in ranks]
    sizes = [len(rows) for rows in received]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == sum(counts)
    sent = torch.cat([_rows(rank, count, dtype) for rank, count in enumerate(counts)])
    # every row arrives once, whole
    assert sorted(torch.cat(received)[:, 0, 0].tolist()) == sorted(sent[:, 0, 0].tolist())
    for rank, (rows, back, grad, upstream) in enumerate(ranks):
        assert rows.dtype == back.dtype == dtype
        assert torch.equal(rows, rows[:, :1, :1].expand_as(rows))
        assert torch.equal(back, _rows(rank, counts[rank], dtype))
        if dtype.is_floating_point:
            assert torch.equal(grad, upstream)
