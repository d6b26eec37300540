"""SyncBN's collective in the forward: the moments of every rank, gathered and merged.

The backward's is the all_reduce of the gradient sums, in ``normalize_function.py``. With the Triton
kernels both are in ``triton/batch_norm.py``, between the launches.
"""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from rethinking_bn.distributed import all_gather
from rethinking_bn.numerics.merge import merge_moments
from rethinking_bn.numerics.moments import Moments


def merge_over_ranks(rows: Moments, group: ProcessGroup | None) -> Moments:
    """Pool each of K sets with the same set of the other ranks, in one all_gather.

    Args:
        rows: counts (K,), means and M2 (K, C) of this rank; a count may be 0.
        group: None: the default group.

    Returns:
        Moments of the same shapes, bitwise the same on every rank.
    """
    packed = torch.cat([rows.count[:, None], rows.mean, rows.m2], dim=1)
    gathered = all_gather(packed, group)
    channels = rows.mean.shape[1]
    return merge_moments(
        gathered[..., 0], gathered[..., 1 : 1 + channels], gathered[..., 1 + channels :]
    )
