"""What is wrong with the BatchNorm of a model, measured, with the remedy; torch only."""

from __future__ import annotations

from rethinking_bn.diagnosis.examine import diagnose
from rethinking_bn.diagnosis.result import Diagnosis, Finding

__all__ = ["Diagnosis", "Finding", "diagnose"]
