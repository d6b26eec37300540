"""Nothing is timed before it is shown to compute the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class ResultsDiffer(RuntimeError):
    """Two sides of a comparison compute different things, so comparing their times is void."""


# Relative to the largest value of a tensor, or to a hundredth of the largest in its list: some
# gradients, such as those of a bias before a BatchNorm, are zero but for rounding.
_SMALL = 1e-2


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the largest relative error that sums of this type may show."""
    return {torch.float64: 1e-9, torch.float32: 2e-4}.get(dtype, 4e-2)


def require_equal(
    what: str, ours: Sequence[Tensor], others: Sequence[Tensor], tolerance: float
) -> float:
    """Compare two lists of tensors.

    Args:
        what: named in the error.
        tolerance: largest |a - b| allowed, as a fraction of the largest value; 0: bit for bit.

    Returns:
        The largest relative error.

    Raises:
        ResultsDiffer: when lengths, shapes or values differ, or a value is not finite.
    """
    if [x.shape for x in ours] != [x.shape for x in others]:
        shapes = [[tuple(x.shape) for x in xs] for xs in (ours, others)]
        raise ResultsDiffer(f"{what}: shapes {shapes[0]} and {shapes[1]}")
    exact = [x.detach().double().cpu() for x in others]
    sizes = [x.abs().max().item() if x.numel() else 0.0 for x in exact]
    worst = 0.0
    for index, (a, b, size) in enumerate(zip(ours, exact, sizes, strict=True)):
        if b.numel() == 0:
            continue
        difference = (a.detach().double().cpu() - b).abs().max().item()
        error = difference / (max(size, _SMALL * max(sizes)) or 1.0)
        if not error <= tolerance:  # also catches NaN
            raise ResultsDiffer(
                f"{what}: tensor {index} of {len(exact)}, shape {tuple(b.shape)}, differs by "
                f"{error:.3g} of its largest value; allowed are {tolerance:.3g}"
            )
        worst = max(worst, error)
    return worst


def require_equal_state(
    what: str, ours: Mapping[str, Tensor], others: Mapping[str, Tensor], tolerance: float
) -> float:
    """Compare the floating-point entries of two state dicts, key by key."""
    keys = [{k for k, v in state.items() if v.is_floating_point()} for state in (ours, others)]
    if keys[0] != keys[1]:
        raise ResultsDiffer(f"{what}: only one side has {sorted(keys[0] ^ keys[1])}")
    errors = [require_equal(f"{what}, {k}", [ours[k]], [others[k]], tolerance) for k in keys[0]]
    return max(errors, default=0.0)
