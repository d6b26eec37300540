"""The paper's findings at laptop scale: torch, torchvision, scikit-learn's digits, no detectron2.

``STUDIES`` maps names to :class:`~rethinking_bn.studies.study.Study`;
:func:`~rethinking_bn.studies.runner.run_study` runs one, and ``tools/run_study.py`` is the
command line.
"""

from __future__ import annotations

from . import domain_shift, population, train_test
from .runner import Interrupted, run_study
from .study import Study

STUDIES: dict[str, Study] = {
    module.STUDY.name: module.STUDY for module in (population, train_test, domain_shift)
}

__all__ = ["STUDIES", "Interrupted", "Study", "run_study"]
