"""Normalisation layers that treat the batch in BatchNorm as a choice; torch only."""

from rethinking_bn.layers.batch_norm import BatchNorm2d, BatchStatNorm2d, SyncBatchNorm2d
from rethinking_bn.layers.compile import compile_norms
from rethinking_bn.layers.convert import convert_norms
from rethinking_bn.layers.cycle import CycleBatchNorm2d
from rethinking_bn.layers.mabn import CenConv2d, MABN2d
from rethinking_bn.layers.multi_domain import MultiDomainBatchNorm2d
from rethinking_bn.layers.norms import get_norm, norm_names
from rethinking_bn.layers.population_layer import PopulationLayer
from rethinking_bn.layers.split import SplitBatchNorm2d, row_domains
from rethinking_bn.numerics.moments import Moments, local_moments, merge_moments, mix_statistics
from rethinking_bn.shuffle.rows import shuffle_rows, unshuffle_rows

__all__ = [
    "BatchNorm2d",
    "BatchStatNorm2d",
    "CenConv2d",
    "CycleBatchNorm2d",
    "MABN2d",
    "Moments",
    "MultiDomainBatchNorm2d",
    "PopulationLayer",
    "SplitBatchNorm2d",
    "SyncBatchNorm2d",
    "compile_norms",
    "convert_norms",
    "get_norm",
    "local_moments",
    "merge_moments",
    "mix_statistics",
    "norm_names",
    "row_domains",
    "shuffle_rows",
    "unshuffle_rows",
]
