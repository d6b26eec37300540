"""What is wrong with the BatchNorm of a model, measured, with the remedy; torch only."""

from __future__ import annotations

from rethinking_bn.diagnosis.diagnose import diagnose
from rethinking_bn.diagnosis.diagnosis import Diagnosis
from rethinking_bn.diagnosis.findings import Finding

__all__ = ["Diagnosis", "Finding", "diagnose"]
