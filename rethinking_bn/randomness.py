"""Seeds derived from where a run stands, and forwards that repeat an earlier one.

Our trainer calls ``set_iteration(run_seed, iteration)`` of every module that has it, on every rank,
before each training step. From the two and a counter of its calls since then the module derives its
seeds (:func:`derive_seed`), so that a resumed run draws the same numbers. A forward that activation
checkpointing recomputes must repeat the first one: see :func:`is_recomputing`, :class:`Forwards`.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

_SEEDS = 2**32  # numpy takes no larger seed
_REMEMBERED = 64  # forwards of a module that can be recomputed
_SAMPLED = 16  # places along each dimension of an input that make its mark

T = TypeVar("T")


@runtime_checkable
class IterationAware(Protocol):
    """A module that wants to know the run's seed and the iteration about to begin."""

    def set_iteration(self, run_seed: int, iteration: int) -> None:
        """Take note of the iteration, and count calls within it from zero again."""


def derive_seed(*ints: int) -> int:
    """Return a seed in [0, 2**63) that depends on every argument and on their order.

    It is the same in every process, unlike ``hash``. Similar arguments give unrelated seeds.
    """
    text = ",".join(str(int(value)) for value in ints)
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def announce_iteration(model: nn.Module, run_seed: int, iteration: int) -> None:
    """Call ``set_iteration`` on every module of ``model`` that is :class:`IterationAware`."""
    for module in model.modules():
        # asking the class is quicker than isinstance on a protocol, in a loop run every step
        if hasattr(type(module), "set_iteration"):
            assert isinstance(module, IterationAware)
            module.set_iteration(run_seed, iteration)


@contextmanager
def isolated_random_state(
    seed: int | None = None, devices: Iterable[torch.device] = ()
) -> Iterator[None]:
    """Put every generator back on exit: Python's, torch's, numpy's, and those of CUDA devices.

    Args:
        seed: of these generators inside; None: they go on from where they are.
        devices: of which the CUDA devices count.
    """
    numpy = sys.modules.get("numpy")  # where nothing has imported it, nothing depends on it
    cuda = [device.index for device in devices if device.type == "cuda"]
    indices = sorted({torch.cuda.current_device() if index is None else index for index in cuda})
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = None if numpy is None else numpy.random.get_state()
    cuda_states = [torch.cuda.get_rng_state(index) for index in indices]
    try:
        if seed is not None:
            random.seed(seed)
            # not torch.manual_seed: that also reaches devices whose state was not kept
            torch.default_generator.manual_seed(seed)
            for index in indices:
                torch.cuda.default_generators[index].manual_seed(seed)
            if numpy is not None:
                numpy.random.seed(seed % _SEEDS)
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        for index, state in zip(indices, cuda_states, strict=True):
            torch.cuda.set_rng_state(state, index)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def is_recomputing() -> bool:
    """Return whether activation checkpointing runs this code a second time.

    Both kinds of ``torch.utils.checkpoint`` do so inside a backward pass, where nothing else runs
    a training forward. A compiler recomputes by itself: what it traces is always a first forward.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def mark_of(x: Tensor) -> Tensor:
    """Return up to 31 numbers by which an input (N, ...) can be told from another one."""
    places = tuple(slice(None, None, max(1, size // _SAMPLED)) for size in x.shape)
    return x.detach()[places].flatten(1).float().sum(1)


@dataclass(eq=False)
class _Forward(Generic[T]):
    mark: Tensor
    value: T
    repeated: Tensor | None = None  # (), how often it was recomputed


class Forwards(Generic[T]):
    """What the newest 64 forwards of a module used, so that recomputed ones use it again.

    A recomputation does not say which forward it repeats: segments come back in reverse order,
    may use a module several times, and may stop early. But its input is the same. So each forward
    has a mark, some numbers that follow from its input, and the nearest mark is taken. Of equally
    near ones it is the least often recomputed, and of those the oldest, which is right for equal
    inputs of one segment, or with ``newest_first`` the newest, right for those of different
    segments. Copies and pickles are empty: no graph could ask them.
    """

    def __init__(self, *, newest_first: bool = False) -> None:
        self._newest_first = newest_first
        self._newest: deque[_Forward[T]] = deque(maxlen=_REMEMBERED)

    def __getstate__(self) -> dict[str, Any]:
        return vars(Forwards(newest_first=self._newest_first))

    def remember(self, mark: Tensor, value: T) -> None:
        """Add the newest forward."""
        self._newest.append(_Forward(mark, value))

    def recall(self, mark: Tensor) -> tuple[list[T], Tensor]:
        """Return values, perhaps none, and () the index of the one that belongs to ``mark``.

        The index is on the device of the mark. The host does not wait for it.
        """
        kind = (mark.shape, mark.dtype, mark.device)
        alike = [f for f in self._newest if (f.mark.shape, f.mark.dtype, f.mark.device) == kind]
        age = torch.arange(len(alike), device=mark.device)
        if not alike:
            return [], age.sum()
        zero = torch.zeros_like(age[0])
        repeated = torch.stack([zero if f.repeated is None else f.repeated for f in alike])
        order = repeated * len(alike) + (age.flip(0) if self._newest_first else age)
        marks = torch.stack([f.mark for f in alike]).nan_to_num()
        distance = (marks - mark.nan_to_num()).abs().sum(1)
        index = order.where(distance == distance.min(), 2**62).argmin()
        for forward, times in zip(alike, (repeated + (age == index)).unbind(), strict=True):
            forward.repeated = times
        return [f.value for f in alike], index

    def find(self, mark: Tensor) -> T | None:
        """Return the value that belongs to ``mark``; the host waits where there are several."""
        values, index = self.recall(mark)
        return values[int(index) if len(values) > 1 else 0] if values else None
