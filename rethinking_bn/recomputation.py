"""Is this forward a second one, by which activation checkpointing recomputes the first?"""

from __future__ import annotations

import torch


def is_recomputing() -> bool:
    """Return whether this code runs inside a backward pass.

    Both kinds of ``torch.utils.checkpoint`` recompute there, and nothing else runs a training
    forward there. What a compiler traces is no recomputation: it makes its own.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
