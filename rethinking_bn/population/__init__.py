"""Population training of any BN-like layer (sections 3 to 5 of arXiv 2105.07576); torch only."""

from __future__ import annotations

from rethinking_bn.population.batch_at_inference import batch_statistics
from rethinking_bn.population.estimate import estimate_population_statistics
from rethinking_bn.population.forwards import inputs_of
from rethinking_bn.population.freezing import freeze_batch_norm, train_only, unfreeze_batch_norm
from rethinking_bn.population.observe import layers_to_estimate
from rethinking_bn.population.report import LayerReport, PopulationReport

__all__ = [
    "LayerReport",
    "PopulationReport",
    "batch_statistics",
    "estimate_population_statistics",
    "freeze_batch_norm",
    "inputs_of",
    "layers_to_estimate",
    "train_only",
    "unfreeze_batch_norm",
]
