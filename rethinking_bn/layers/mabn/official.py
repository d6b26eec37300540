"""State dicts of the official MABN code, which are laid out differently."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any


def is_official(state_dict: Mapping[str, Any], prefix: str) -> bool:
    """Return whether the layer at ``prefix`` was saved by the official code.

    Its general layer keeps the mean square as ``running_var`` of shape (1, C, 1, 1), which no
    BatchNorm does; the one of its classification code as (C,) beside a ``sta_matrix``.
    """
    running = state_dict.get(prefix + "running_var")
    if running is None:
        return False
    return running.ndim == 4 or prefix + "sta_matrix" in state_dict


def convert_official(state_dict: MutableMapping[str, Any], prefix: str) -> bool:
    """Rename and reshape, in place, what the official code saved of one layer.

    The official rings hold the value of iteration t (from 1) in row t mod m, ours in row
    (t - 1) mod m. The classification code's averages run over groups of images within one
    iteration and have no counterpart: its layers start the warm-up again.

    Args:
        state_dict: a state dict with the layer's entries.
        prefix: of the layer, with its dot.

    Returns:
        whether the layer was one of the official code; otherwise nothing has changed.
    """
    if not is_official(state_dict, prefix):
        return False
    state_dict[prefix + "running_mean_square"] = state_dict.pop(prefix + "running_var").flatten()
    count = state_dict.pop(prefix + "iters", None)
    for name in ("sta_matrix", "pre_x2", "pre_gz"):
        state_dict.pop(prefix + name, None)
    squares = state_dict.pop(prefix + "buffer_x2", None)
    products = state_dict.pop(prefix + "buffer_gz", None)
    if count is not None and squares is not None and products is not None:
        for name, values in (("mean_square_ring", squares), ("gradient_ring", products)):
            state_dict[f"{prefix}{name}.count"] = count.reshape(())
            state_dict[f"{prefix}{name}.last_{len(values)}"] = values.roll(-1, 0)
    return True
