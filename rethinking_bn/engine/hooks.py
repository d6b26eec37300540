"""One line that puts every hook of ours which a config enables at its place among detectron2's."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine import hooks as detectron2_hooks
from torch import nn

from rethinking_bn.config import check_has_keys
from rethinking_bn.engine.diagnose_bn import DiagnoseBN
from rethinking_bn.engine.freeze_bn import FreezeBN
from rethinking_bn.engine.load_config import changed
from rethinking_bn.engine.loaders import build_together
from rethinking_bn.engine.precise_bn import PreciseBN
from rethinking_bn.engine.rank_state import MergeStatistics
from rethinking_bn.engine.unread_keys import FollowKeys, warn_of_unread_keys
from rethinking_bn.engine.weight_average import WeightAverage

logger = logging.getLogger(__name__)

# detectron2's hooks that read the statistics, and so come after what changes them
_READERS = (
    detectron2_hooks.PeriodicCheckpointer,
    detectron2_hooks.BestCheckpointer,
    detectron2_hooks.EvalHook,
    detectron2_hooks.PeriodicWriter,
)
# In the order in which they run. Each has from_config(cfg, model, loader), which returns None where
# the config does not ask for it; loader() builds the loader of population training, on all ranks.
_OURS: Any = (FollowKeys, PreciseBN, FreezeBN, WeightAverage, DiagnoseBN, MergeStatistics)


def with_rethinking_bn(
    hooks: Sequence[HookBase | None],
    cfg: Any,
    model: nn.Module,
    *,
    data_loader: Iterable[Any] | None = None,
) -> list[HookBase | None]:
    """Add every hook of ours that ``cfg`` enables to a list of detectron2's.

    :class:`~rethinking_bn.engine.TrainerMixin` does this and follows the other keys, too. For the
    hooks alone, in ``build_hooks`` of any DefaultTrainer (or for the list in
    tools/lazyconfig_train_net.py)::

        def build_hooks(self):
            return with_rethinking_bn(super().build_hooks(), self.cfg, self.model)

    Ours run one after another before the first hook that checkpoints, evaluates or writes, or where
    detectron2's PreciseBN was, which ours replaces. A hook of ours that is there already stays. One
    refuses to train where a key of ours is set that hooks cannot follow and the trainer does not.

    Args:
        hooks: in their order, None allowed; not modified.
        cfg: with our keys.
        model: the trainer's, data-parallel wrapper included.
        data_loader: batches for population training; every ``iter()`` must start over. None: what
            TEST.PRECISE_BN describes.

    Raises:
        ValueError: for keys of ``cfg`` that cannot be followed, on all ranks.
    """
    warn_of_unread_keys(cfg)
    if isinstance(cfg, CfgNode):
        check_has_keys(cfg)
    result = list(hooks)
    stock = detectron2_hooks.PreciseBN
    place = next(
        (i for i, hook in enumerate(result) if isinstance(hook, (stock, *_READERS, *_OURS))),
        len(result),
    )
    if cfg.TEST.PRECISE_BN.ENABLED:  # nothing before `place` is removed
        result = [hook for hook in result if not isinstance(hook, stock)]
    elif place < len(result) and isinstance(result[place], stock):
        place += 1  # it stays, and what reads its statistics comes after it

    @cache
    def loader() -> Iterable[Any]:
        for hook in result:
            if isinstance(hook, PreciseBN):
                return hook.data_loader
        return build_together(cfg) if data_loader is None else data_loader

    for kind in _OURS:
        there = next((i for i, hook in enumerate(result) if isinstance(hook, kind)), None)
        if there is not None:
            place = there + 1
            continue
        hook = kind.from_config(cfg, model, loader)
        if hook is not None:
            result.insert(place, hook)
            place += 1
            if isinstance(hook, WeightAverage):
                _evaluate_too(hook, result, cfg)
    return result


def _evaluate_too(average: WeightAverage, hooks: list[HookBase | None], cfg: Any) -> None:
    """Evaluate the average right after the model, into a folder of its own."""
    there = [i for i, hook in enumerate(hooks) if isinstance(hook, detectron2_hooks.EvalHook)]
    if not there:
        return
    own = changed(cfg, "OUTPUT_DIR", os.path.join(cfg.OUTPUT_DIR, "averaged"))

    def evaluate() -> Any:
        if not hasattr(average.trainer, "test"):
            logger.info("This trainer has no test(), so the averaged weights are not evaluated.")
            return None
        return average.evaluate(lambda model: average.trainer.test(own, model))

    hooks.insert(there[0] + 1, detectron2_hooks.EvalHook(cfg.TEST.EVAL_PERIOD, evaluate))
