"""The forwards of population training: ranks in step, with or without labels."""

from __future__ import annotations

import itertools
import logging
import operator
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, SupportsIndex, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rethinking_bn.distributed import (
    all_gather_object,
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
_TOLD = "every rank knows"  # an attribute of exceptions
_lock = threading.Lock()
_in_use: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # by which thread

Prepared = TypeVar("Prepared")
Autocast = Callable[[], AbstractContextManager[Any]]
Forward = Callable[[Any, Any], Any]  # (model, batch)


def is_labelled(batch: Any) -> bool:
    """Return whether a batch has ground truth: False only for detectron2's dicts without any."""
    dicts = batch if _are_dicts_of_detectron2(batch) else ()
    return all(any(key in sample for key in _GROUND_TRUTH) for sample in dicts)


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
        what = f"a {type(batch).__name__}"
        if isinstance(batch, (list, tuple)):
            what += f" of {', '.join(type(part).__name__ for part in batch[:4])}"
        raise ValueError(
            f"the model cannot be called with {what} as the loader gives it "
            f"({type(error).__name__}: {error}): say how by forward=, such as "
            f"forward=lambda model, batch: {example}"
        ) from error


def _are_dicts_of_detectron2(batch: Any) -> bool:
    samples = batch if isinstance(batch, (list, tuple)) else ()
    each = [isinstance(sample, dict) and "image" in sample for sample in samples]
    return bool(each) and all(each)


def check_number(num_batches: Any, batches: Any, least: int = 1) -> None:
    """Raise a ValueError unless so many batches can be taken from a loader; None: all it has."""
    if num_batches is None:
        try:
            len(batches)
        except TypeError as error:  # an iterator, or a DataLoader over an iterable data set
            raise ValueError(
                f"num_batches is None, but the loader ({type(batches).__name__}) has no length: "
                "say how many batches to take"
            ) from error
    elif (
        isinstance(num_batches, bool)
        or not isinstance(num_batches, SupportsIndex)
        or operator.index(num_batches) < least
    ):
        raise ValueError(
            f"num_batches must be an integer, {least} or more, or None, got {num_batches!r}"
        )


def vote(
    error: BaseException | None, group: ProcessGroup | None, labels: bool = True, done: bool = False
) -> tuple[bool, bool]:
    """Fail on all ranks if one has an error; else return if all have labels, and if one is done.

    What is raised is marked: where it leaves the forward of another run, all ranks know of it.
    """
    if error is not None and get_world_size(group) == 1:
        raise error
    try:
        gathered = gather_numbers([error is not None, labels, done], group)
        if any(failed for failed, _, _ in gathered):
            raise_together(error, group)
    except BaseException as raised:
        error = error or raised
        vars(error)[_TOLD] = True
        raise error from error.__cause__
    return all(known for _, known, _ in gathered), any(ended for _, _, ended in gathered)


@contextmanager
def together(
    model: nn.Module,
    prepare: Callable[[], tuple[Prepared, dict[str, Any]]],
    group: ProcessGroup | None,
) -> Iterator[Prepared]:
    """Keep a model for one run, once every rank has prepared for it; else fail on all ranks.

    A run on modules that another run keeps is refused: both set momentum and buffers of the same
    layers, so that neither's numbers would be right. What ``prepare`` returns besides must be the
    same on all ranks.
    """
    modules, thread = list(model.modules()), threading.get_ident()
    error: Exception | None = None
    with ExitStack() as stack:
        try:
            with _lock:
                users = {_in_use.get(module) for module in modules} - {None}
                if users:
                    raise RuntimeError(
                        "another population training or diagnosis of this model is running: one "
                        "within the other, or in two threads, would mix up the statistics of both"
                    )
                _in_use.update(dict.fromkeys(modules, thread))
            for module in modules:
                stack.callback(_in_use.pop, module)
            prepared, plan = prepare()
        except Exception as raised:
            if thread in users:  # the run around this one will tell the other ranks
                raise
            error = raised
        vote(error, group)
        plans = all_gather_object(plan, group)
        for what in plan:
            values = [of_rank[what] for of_rank in plans]
            if any(value != values[0] for value in values):
                said = [f"rank {r}: {textwrap.shorten(repr(v), 300)}" for r, v in enumerate(values)]
                raise ValueError(f"ranks disagree about {what}: {'; '.join(said)}")
        yield prepared


@dataclass
class PopulationRun:
    """The forwards, each begun only when every rank has a batch and none has failed.

    Attributes are as in :func:`rethinking_bn.population.estimate_population_statistics`, and

        layers: those that normalise by mini-batches, in training mode.
        title: of its log lines.
        done: forwards run on this rank, and on every other.
    """

    model: nn.Module
    layers: Sequence[nn.Module]
    num_batches: int | None
    group: ProcessGroup | None
    autocast: Autocast | None
    forward: Forward
    seed: int | None
    progress: bool
    title: str = "population training"
    done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.rank, self.world = get_rank(self.group), get_world_size(self.group)
        self.communicates = any(communicates(module) for module in self.model.modules())

    def __call__(self, batches: Iterable[Any], labelled: bool | None) -> bool:
        """Run every batch and return whether they were taken as labelled."""
        self._start = self._said = time.monotonic()
        count = "all" if self.num_batches is None else self.num_batches
        self._say("of %d layers: %s batches per rank", len(self.layers), count)
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
                labels, done = vote(error, self.group, labels, done)
                if done:
                    break
                if index == 0:
                    labelled = labels
                if index == 0 and not labelled:  # train() does more than to set the mode
                    keep = {m for layer in self.layers for m in layer.modules() if m.training}
                    for module in self.model.modules():
                        module.training = module in keep
                error = self._forward(index, batch)
                self.done = index + 1
                self._tell_progress()
        return bool(labelled)

    def _forward(self, index: int, batch: Any) -> BaseException | None:
        """Run one forward; return what it raised, to be told to the other ranks."""
        try:
            if self.seed is not None:
                announce_iteration(self.model, self.seed, index)
            with (self.autocast or nullcontext)():
                self.forward(self.model, batch)
        except BaseException as raised:
            if self.world == 1 or self.communicates or _TOLD in vars(raised):
                raise
            logger.error("rank %d: the forward of batch %d failed: %r", self.rank, index, raised)
            return raised
        return None

    def _loader_error(self, raised: BaseException, had: int) -> BaseException:
        if not isinstance(raised, Exception):
            return raised
        number = had if self.num_batches is None else f"{had} of {self.num_batches}"
        text = f"rank {self.rank}: the loader {{}} after {number} batches"
        if isinstance(raised, StopIteration):
            return ValueError(text.format("ended"))
        error = RuntimeError(f"{text.format('failed')}: {type(raised).__name__}: {raised}")
        error.__cause__ = raised
        return error

    def _say(self, text: str, *values: Any) -> None:
        if self.progress and self.rank == 0:
            logger.info(f"%s {text}", self.title, *values)

    def _tell_progress(self) -> None:
        """Log every few seconds how far the run is and when it will be done."""
        now, total = time.monotonic(), self.num_batches
        if now - self._said < _SECONDS_BETWEEN_LINES or self.done == total:
            return
        self._said = now
        each = (now - self._start) / self.done
        eta = f", eta {timedelta(seconds=round(each * (total - self.done)))}" if total else ""
        self._say("has done %d of %s batches, %.3f s each%s", self.done, total or "all", each, eta)


def throwaway_event_storage() -> AbstractContextManager[Any]:
    """Return a context that swallows what models write to detectron2's event storage."""
    events = sys.modules.get("detectron2.utils.events")
    # from 1: models draw pictures at iteration 0 when they draw any
    return nullcontext() if events is None else events.EventStorage(1)
