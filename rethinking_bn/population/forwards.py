"""The forwards of population training: ranks in step, with or without labels."""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rethinking_bn.distributed import (
    gather_numbers,
    get_rank,
    get_world_size,
    raise_together,
)
from rethinking_bn.layers.bn_like import communicates
from rethinking_bn.randomness import announce_iteration

# one name for all of population training
logger = logging.getLogger("rethinking_bn.population")

_GROUND_TRUTH = ("instances", "sem_seg")  # keys of what detectron2's mapper returns
_SECONDS_BETWEEN_LINES = 10.0

Autocast = Callable[[], AbstractContextManager[Any]]
Forward = Callable[[Any, Any], Any]  # (model, batch)


def is_labelled(batch: Any) -> bool:
    """Return whether a batch has ground truth: False only for detectron2's dicts without any."""
    if not _are_dicts_of_detectron2(batch):
        return True
    return all(any(key in sample for key in _GROUND_TRUTH) for sample in batch)


def inputs_of(batch: Any) -> Any:
    """Return what of a loader's batch a model is called with.

    The first of two, where these are inputs (a tensor, or a list of tensors) and labels (a tensor
    or list of integers or truth values, a dict, a list of dicts); everything else as it is.
    """
    if type(batch) not in (list, tuple) or len(batch) != 2:
        return batch
    inputs, labels = batch
    parts = inputs if isinstance(inputs, (list, tuple)) else [inputs]
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        return batch
    if isinstance(labels, Tensor):
        # two byte images are two images
        alike = labels.dtype == parts[0].dtype and labels.dim() == parts[0].dim()
        return batch if labels.is_floating_point() or alike else inputs
    each = labels if isinstance(labels, (list, tuple)) else [labels]
    return inputs if all(isinstance(label, (int, dict)) for label in each) else batch


def call_model(model: nn.Module, batch: Any) -> Any:
    """Run a model on a loader's batch, by :func:`inputs_of`: what ``forward=None`` stands for.

    Raises:
        ValueError: where a model cannot be called with a tuple, list or dict as the loader gives
            it; names ``forward=``, with an example.
    """
    inputs = inputs_of(batch)
    try:
        return model(inputs)
    except (TypeError, AttributeError, AssertionError, ValueError, NotImplementedError) as error:
        if isinstance(batch, Tensor) or _are_dicts_of_detectron2(batch):
            raise
        example = "model(batch[0])" if inputs is batch else "model(*batch)"
        example = "model(**batch)" if isinstance(batch, Mapping) else example
        raise ValueError(
            f"the model cannot be called with {_in_words(batch)} as the loader gives it "
            f"({type(error).__name__}: {error}): say how by forward=, such as "
            f"forward=lambda model, batch: {example}"
        ) from error


def _in_words(batch: Any) -> str:
    kind = type(batch).__name__
    if isinstance(batch, (list, tuple)):
        return f"a {kind} of {', '.join(type(part).__name__ for part in batch[:4])}"
    return f"a {kind}"


def _are_dicts_of_detectron2(batch: Any) -> bool:
    if not isinstance(batch, (list, tuple)) or not batch:
        return False
    return all(isinstance(sample, dict) and "image" in sample for sample in batch)


class PopulationRun:
    """The forwards, each begun only when every rank has a batch and none has failed.

    Attributes:
        done: forwards run on this rank, and on every other.

    Args:
        model: unwrapped.
        layers: those that normalise by mini-batches, in training mode.
        num_batches: None: until the first rank's loader ends.
        title: of its log lines.
        num_batches, group, autocast, forward, seed, progress: as in
            :func:`rethinking_bn.population.estimate_population_statistics`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        num_batches: int | None,
        group: ProcessGroup | None,
        autocast: Autocast,
        forward: Forward,
        seed: int | None,
        progress: bool,
        title: str = "population training",
    ) -> None:
        self.model, self.layers, self.num_batches = model, layers, num_batches
        self.group, self.rank, self.world = group, get_rank(group), get_world_size(group)
        self.autocast, self.forward, self.seed = autocast, forward, seed
        self.progress, self.title = progress and self.rank == 0, title
        self.communicates = any(communicates(module) for module in model.modules())
        self.done = 0

    def __call__(self, batches: Iterable[Any], labelled: bool | None) -> bool:
        """Run every batch and return whether they were taken as labelled."""
        self._start = self._said = time.monotonic()
        if self.progress:
            count = "all" if self.num_batches is None else self.num_batches
            logger.info("%s of %d layers: %s batches per rank", self.title, len(self.layers), count)
        error: BaseException | None = None
        iterator: Iterator[Any] | None = None
        with throwaway_event_storage():
            # once more than there are batches: the last forward may have failed, too
            for index in itertools.count():
                batch, done = None, index == self.num_batches
                if error is None and not done:
                    try:
                        iterator = iter(batches) if iterator is None else iterator
                        batch = next(iterator)
                    except BaseException as raised:
                        done = self.num_batches is None and isinstance(raised, StopIteration)
                        error = None if done else self._loader_error(raised, index)
                labels = is_labelled(batch) if labelled is None else labelled
                labels, done = self._agree(error, labels, done)
                if done:
                    break
                if index == 0:
                    labelled = labels
                    if not labelled:
                        self._only_normalise_by_batches()
                error = self._forward(index, batch)
                self.done = index + 1
                self._tell_progress()
        return bool(labelled)

    def _forward(self, index: int, batch: Any) -> BaseException | None:
        """Run one forward; return what it raised, to be told to the other ranks."""
        try:
            if self.seed is not None:
                announce_iteration(self.model, self.seed, index)
            with self.autocast():
                self.forward(self.model, batch)
        except BaseException as raised:
            if self.world == 1 or self.communicates:
                raise
            logger.error("rank %d: the forward of batch %d failed: %r", self.rank, index, raised)
            return raised
        return None

    def _loader_error(self, raised: BaseException, had: int) -> BaseException:
        where = f"rank {self.rank}: the loader"
        number = had if self.num_batches is None else f"{had} of {self.num_batches}"
        if isinstance(raised, StopIteration):
            return ValueError(f"{where} ended after {number} batches")
        if not isinstance(raised, Exception):
            return raised
        what = f"{type(raised).__name__}: {raised}"
        error = RuntimeError(f"{where} failed after {number} batches: {what}")
        error.__cause__ = raised
        return error

    def _agree(self, error: BaseException | None, labelled: bool, done: bool) -> tuple[bool, bool]:
        """Fail together, or return whether all ranks have labels, and whether one is done."""
        if self.world == 1:
            if error is not None:
                raise error
            return labelled, done
        try:
            gathered = gather_numbers([error is not None, labelled, done], self.group)
        except BaseException:
            if error is not None:
                raise error from None
            raise
        if any(failed for failed, _, _ in gathered):
            raise_together(error, self.group)
        return all(labels for _, labels, _ in gathered), any(done for _, _, done in gathered)

    def _tell_progress(self) -> None:
        """Log every few seconds how far the run is and when it will be done."""
        now, total = time.monotonic(), self.num_batches
        if not self.progress or now - self._said < _SECONDS_BETWEEN_LINES or self.done == total:
            return
        self._said = now
        each = (now - self._start) / self.done
        left = (
            "" if total is None else f", eta {timedelta(seconds=round(each * (total - self.done)))}"
        )
        of = "" if total is None else f"/{total}"
        logger.info("%s: %d%s batches, %.3f s each%s", self.title, self.done, of, each, left)

    def _only_normalise_by_batches(self) -> None:
        """Set eval mode but for the estimated layers, without calling train(), which does more."""
        keep = {m for layer in self.layers for m in layer.modules() if m.training}
        for module in self.model.modules():
            module.training = module in keep


def throwaway_event_storage() -> AbstractContextManager[Any]:
    """Return a context that swallows what models write to detectron2's event storage."""
    events = sys.modules.get("detectron2.utils.events")
    # from 1: models draw pictures at iteration 0 when they draw any
    return nullcontext() if events is None else events.EventStorage(1)
