"""Moments (count, mean, M2) of channels: the one representation in which statistics are pooled.

M2 is the sum of squared deviations from the mean. Merging moments is exact over levels,
iterations and ranks alike (:mod:`.merge`), and unlike E[x²] - E[x]² it does not cancel when the
mean is large beside the standard deviation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_HALF_TYPES = (torch.float16, torch.bfloat16)


class Moments(NamedTuple):
    """Moments of C channels in D independent sets of values (one row a set).

    Attributes:
        count: (D,) values per channel, as floating point.
        mean: (D, C); 0 where the count is 0.
        m2: (D, C), sum of squared deviations from the mean; 0 where the count is 0.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nothing here calls
    mean: Tensor
    m2: Tensor

    def variance(self, *, unbiased: bool = False) -> Tensor:
        """Return (D, C): m2 / count, or m2 / (count - 1); 0 where that would divide by zero."""
        divisor = self.count - 1 if unbiased else self.count
        return self.m2 / divisor.clamp(min=1)[..., None]

    def to(self, target: torch.dtype | torch.device) -> Moments:
        """Return the moments with every tensor moved by ``Tensor.to``."""
        return Moments(*(value.to(target) for value in self))  # type: ignore[call-overload]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which statistics of an input of type ``dtype`` are computed."""
    return torch.float32 if dtype in _HALF_TYPES else dtype
