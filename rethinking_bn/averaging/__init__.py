"""Averaged weights (EMA, SWA) with BatchNorm statistics of their own; torch only."""

from __future__ import annotations

from rethinking_bn.averaging.weights import AveragedWeights

__all__ = ["AveragedWeights"]
