"""Training with detectron2: the trainer, its hooks and optimizer, and the command line's parts."""

# ruff: noqa: E402
from __future__ import annotations

from rethinking_bn._detectron2 import require_detectron2

require_detectron2("rethinking_bn.engine")

from rethinking_bn.checkpointer import Checkpointer
from rethinking_bn.engine.accumulation import AccumulatingAMPTrainer, AccumulatingTrainer
from rethinking_bn.engine.diagnose_bn import DiagnoseBN, run_diagnosis
from rethinking_bn.engine.freeze_bn import FreezeBN
from rethinking_bn.engine.hooks import with_rethinking_bn
from rethinking_bn.engine.load_config import load_config
from rethinking_bn.engine.loaders import (
    ResumableTrainLoader,
    build_population_loader,
    build_train_loader,
)
from rethinking_bn.engine.precise_bn import (
    PreciseBN,
    inference_statistics,
    run_population_training,
)
from rethinking_bn.engine.rank_state import MergeStatistics, merge_statistics
from rethinking_bn.engine.trainer import Trainer
from rethinking_bn.engine.trainer_mixin import TrainerMixin, build_optimizer, decay_norms
from rethinking_bn.engine.weight_average import WeightAverage

__all__ = [
    "AccumulatingAMPTrainer",
    "AccumulatingTrainer",
    "Checkpointer",
    "DiagnoseBN",
    "FreezeBN",
    "MergeStatistics",
    "PreciseBN",
    "ResumableTrainLoader",
    "Trainer",
    "TrainerMixin",
    "WeightAverage",
    "build_optimizer",
    "build_population_loader",
    "build_train_loader",
    "decay_norms",
    "inference_statistics",
    "load_config",
    "merge_statistics",
    "run_diagnosis",
    "run_population_training",
    "with_rethinking_bn",
]
