"""Normalisation layers that treat the batch in BatchNorm as a choice; torch only."""

from .batch_norm import BatchNorm2d, BatchStatNorm2d, SyncBatchNorm2d
from .cen_conv import CenConv2d, fold_centring
from .cycle import CycleBatchNorm2d
from .get_norm import get_norm, norm_names
from .local_moments import local_moments
from .mabn import MABN2d
from .moments import Moments, merge_moments, mix_statistics
from .multi_domain import MultiDomainBatchNorm2d
from .population_layer import PopulationLayer
from .shuffle import shuffle_rows, unshuffle_rows

__all__ = [
    "BatchNorm2d",
    "BatchStatNorm2d",
    "CenConv2d",
    "CycleBatchNorm2d",
    "MABN2d",
    "Moments",
    "MultiDomainBatchNorm2d",
    "PopulationLayer",
    "SyncBatchNorm2d",
    "fold_centring",
    "get_norm",
    "local_moments",
    "merge_moments",
    "mix_statistics",
    "norm_names",
    "shuffle_rows",
    "unshuffle_rows",
]
