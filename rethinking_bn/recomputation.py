"""Is this forward a second one, by which activation checkpointing recomputes the first?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def is_recomputing() -> bool:
    """Return whether this code runs inside a backward pass.

    Both kinds of ``torch.utils.checkpoint`` recompute there, and nothing else runs a training
    forward there. What a compiler traces is no recomputation: it makes its own.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def recognise(mark: Tensor, marks: Sequence[Tensor]) -> int:
    """Return which earlier call a recomputed one repeats.

    Args:
        mark: a few values of the recomputed call's input.
        marks: the same of the earlier calls, at least one.

    Returns:
        the index of the nearest mark; of equally near ones, and without one of its shape, the last.
    """
    alike = [(i, marks[i]) for i in reversed(range(len(marks))) if marks[i].shape == mark.shape]
    if len(marks) == 1 or not alike:
        return len(marks) - 1
    distances = torch.stack([(other - mark).abs().sum() for _, other in alike])
    return alike[int(distances.nan_to_num(math.inf).argmin())][0]
