"""The paper's findings at laptop scale: torch, torchvision, scikit-learn's digits, no detectron2.

``STUDIES`` maps names to :class:`~studies.study.Study`; ``tools/run_study.py`` is the command line.
"""

from __future__ import annotations

from importlib import import_module

from studies.study import Study

_MODULES = (
    *("rows", "population", "train_test", "domain_shift", "domains", "leakage"),
    *("small_batch", "averaging", "ema_momentum", "distillation", "resolution"),
)
STUDIES: dict[str, Study] = {
    study.name: study for study in (import_module(f"studies.{name}").STUDY for name in _MODULES)
}
