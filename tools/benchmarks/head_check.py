"""Whether two heads compute the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.equality import require_equal, require_equal_state, tolerance_of
from benchmarks.retinanet_heads import head_forward, head_step


def output_gradients(head: nn.Module, features: Sequence[Tensor]) -> list[Tensor]:
    """Return seeded gradients for a head's outputs; the head's own state does not change."""
    with torch.no_grad():
        outputs = head_forward(copy.deepcopy(head), features)
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(y.shape, generator=generator).to(y) for y in outputs]


def check_heads(pair: str, ours: nn.Module, other: nn.Module, features: Sequence[Tensor]) -> float:
    """Compare outputs, all gradients and the state after one step of copies in float64.

    In float32 a rounding error now and then moves a value across a ReLU's zero, and the gradient
    there by its whole size.

    Returns:
        The largest relative error.

    Raises:
        ResultsDiffer: when anything differs.
    """
    xs = [x.detach().double().requires_grad_() for x in features]
    copies = [copy.deepcopy(head).double() for head in (ours, other)]
    dys = output_gradients(copies[0], xs)
    tolerance = tolerance_of(torch.float64)
    steps = [head_step(head, xs, dys) for head in copies]
    errors = [
        require_equal(f"{pair}, {what}", steps[0][index], steps[1][index], tolerance)
        for index, what in enumerate(("outputs", "gradients"))
    ]
    # a head that wraps another holds it as "head"
    states = [
        {key.removeprefix("head."): value for key, value in head.state_dict().items()}
        for head in copies
    ]
    return max(*errors, require_equal_state(f"{pair}, state", states[0], states[1], tolerance))
