"""Population training of any BN-like layer (sections 3 to 5 of arXiv 2105.07576); torch only."""

from __future__ import annotations

from rethinking_bn.population.estimate import estimate_population_statistics
from rethinking_bn.population.report import LayerReport, PopulationReport

__all__ = ["LayerReport", "PopulationReport", "estimate_population_statistics"]
