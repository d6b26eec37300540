"""Population training of any BN-like layer (sections 3 to 5 of arXiv 2105.07576); torch only."""

from __future__ import annotations

from rethinking_bn.population.batch_at_inference import batch_statistics
from rethinking_bn.population.estimate import estimate_population_statistics
from rethinking_bn.population.freeze_model import freeze_batch_norm, unfreeze_batch_norm
from rethinking_bn.population.report import LayerReport, PopulationReport
from rethinking_bn.population.train_part import train_only

__all__ = [
    "LayerReport",
    "PopulationReport",
    "batch_statistics",
    "estimate_population_statistics",
    "freeze_batch_norm",
    "train_only",
    "unfreeze_batch_norm",
]
