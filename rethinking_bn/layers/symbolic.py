"""The package's layers under torch.fx.symbolic_trace: nodes of their own, as torch's layers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.fx import Proxy


def as_leaf(layer: nn.Module, x: Proxy | Sequence[Any]) -> Any:
    """Return the result of calling ``layer`` as one node of the graph that is being traced.

    Args:
        x: its argument, a proxy or a sequence with one.
    """
    first: Any = x if isinstance(x, Proxy) else next(p for p in x if isinstance(p, Proxy))
    name = first.tracer.path_of_module(layer)
    return first.tracer.create_proxy("call_module", name, (x,), {})
