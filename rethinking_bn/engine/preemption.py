"""SIGTERM as schedulers mean it: finish the iteration, save, and end; --resume goes on."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from typing import Any

import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from torch.distributed.distributed_c10d import _get_default_store

from rethinking_bn.engine.rank_state import merge_statistics

logger = logging.getLogger(__name__)

GRACE = 30.0  # seconds from the signal to the end, with a checkpoint or without
PREEMPTED = 143  # exit status, as the shell's for SIGTERM

_SAME_SIGNAL = 1.0  # seconds in which a launcher's SIGTERM and a scheduler's count as one


class Preempted(SystemExit):
    """Ends a run that has saved after SIGTERM; the exit status is 143."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


class Preemption(HookBase):
    """Let a SIGTERM to any rank end training on all, in the same iteration, with a checkpoint.

    The checkpoint holds the statistics merged over the ranks, as every checkpoint does, but each
    rank's own for resuming: the resumed run is the one that was not ended, bit for bit. Population
    training is not run for it; evaluation that is due in the same iteration is left out, that of
    the last iteration too. A second SIGTERM ends the process at once, and so does the end of 30
    seconds.

    State read: the trainer's iteration. State changed: none, unless it saves; SIGTERM's handler
    while training. All ranks must have it. Must come after the hooks that merge and checkpoint.
    """

    _trainings = 0  # in this process, and so of this process group

    def before_train(self) -> None:
        """Take over SIGTERM."""
        Preemption._trainings += 1
        self._key = f"rethinking_bn/stop_at/{Preemption._trainings}"
        self._asked: float | None = None
        self._told = False
        self._timer: threading.Timer | None = None
        # in the last iterations every rank is at most this far ahead of another: gradients are
        # summed in each, but on a GPU that is only queued
        self._lead = 0
        if comm.get_world_size() > 1:
            self._lead = 3 if dist.get_backend() == "nccl" else 1
        self._handler: Any = None
        self._handles = threading.current_thread() is threading.main_thread()
        if self._handles:
            self._handler = signal.signal(signal.SIGTERM, self._ask)

    def after_train(self) -> None:
        """Give SIGTERM back."""
        if self._timer is not None:
            self._timer.cancel()
        if self._handles:
            signal.signal(signal.SIGTERM, self._handler or signal.SIG_DFL)

    def after_step(self) -> None:
        """Save and raise :class:`Preempted`, if all ranks are to stop here."""
        following = self.trainer.iter + 1
        ends = following >= self.trainer.max_iter
        if self._stop_at(following, ends) != following:
            return
        name = "model_final" if ends else f"model_{self.trainer.iter:07d}"
        if not ends:  # what ends is saved already
            # before merging: each rank goes on with its own
            self.trainer.gather_rank_states()
            merge_statistics(self.trainer.model)
            if comm.is_main_process():
                self.trainer.checkpointer.save(name, iteration=self.trainer.iter)
        logger.warning("SIGTERM: saved as %s.pth; --resume goes on from there.", name)
        comm.synchronize()  # nobody ends before it is saved
        # which run once more at the end of the last iteration
        hooks = [hook for hook in self.trainer._hooks if not isinstance(hook, EvalHook)]
        self.trainer._hooks[:] = hooks
        raise Preempted

    def _stop_at(self, following: int, ends: bool) -> int | None:
        """Return the number of iterations after which all ranks stop, None if nobody asked."""
        if comm.get_world_size() == 1:
            return None if self._asked is None else following
        store = _get_default_store()
        if self._asked is not None and not self._told:
            last = following if ends else min(following + self._lead, self.trainer.max_iter)
            store.compare_set(self._key, "", str(last))  # the first one decides
            self._told = True
        if ends:
            comm.synchronize()  # who has not been asked by now is not asked any more
        return int(store.get(self._key)) if store.check([self._key]) else None

    def _ask(self, *_: Any) -> None:
        """Handle SIGTERM; called between two of the process's instructions, so it does little."""
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
            self._timer = threading.Timer(GRACE, _end)
            self._timer.daemon = True
            self._timer.start()
        elif not _is_forwarded() or now - self._asked > _SAME_SIGNAL:
            _end()


def _is_forwarded() -> bool:
    """Return whether there is a launcher that passes on what the scheduler may also send here."""
    return multiprocessing.parent_process() is not None or "TORCHELASTIC_RUN_ID" in os.environ


def _end() -> None:
    os.write(2, b"SIGTERM: ended without a checkpoint\n")
    os._exit(PREEMPTED)
