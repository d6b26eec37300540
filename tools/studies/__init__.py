"""The paper's findings at laptop scale: torch, torchvision, scikit-learn's digits, no detectron2.

``STUDIES`` maps names to :class:`~studies.study.Study`;
:func:`~studies.runner.run_study` runs one, and ``tools/run_study.py`` is the
command line.
"""

from __future__ import annotations

from studies import (
    averaging,
    distillation,
    domain_shift,
    domains,
    ema_momentum,
    leakage,
    population,
    resolution,
    small_batch,
    table_5,
    train_test,
)
from studies.runner import Interrupted, run_study
from studies.study import Study

_MODULES = (
    table_5,
    population,
    train_test,
    domain_shift,
    domains,
    leakage,
    small_batch,
    averaging,
    ema_momentum,
    distillation,
    resolution,
)
STUDIES: dict[str, Study] = {module.STUDY.name: module.STUDY for module in _MODULES}

__all__ = ["STUDIES", "Interrupted", "Study", "run_study"]
