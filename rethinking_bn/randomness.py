"""Seeds as pure functions of where a run stands, and generators left as they were found.

The protocol for modules that draw random numbers of their own (the shuffling heads do): a method
``set_iteration(run_seed: int, iteration: int) -> None``. Our trainer calls it on every module
that has one, on every rank, before each training step; with :func:`derive_seed` of the two and
of a counter of calls since then, the module draws the same numbers in a resumed run. Under a
trainer that does not call it, the module falls back to what it can know of the iteration.

numpy is used only where something has imported it already; without it nobody can depend on it.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import nn

_SEEDS = 2**32  # numpy takes no larger seed


@runtime_checkable
class IterationAware(Protocol):
    """A module that wants to know the run's seed and the iteration about to begin."""

    def set_iteration(self, run_seed: int, iteration: int) -> None:
        """Take note of the iteration, and count calls within it from zero again."""


def derive_seed(*ints: int) -> int:
    """Return a seed in [0, 2**63) that depends on every argument and on their order.

    The same on every machine, Python version and process (unlike ``hash``); neighbouring
    arguments give unrelated seeds. Any integer is accepted, negative ones included.
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


def _cuda_indices(devices: Iterable[torch.device]) -> list[int]:
    """Return the indices of the CUDA devices among ``devices``, each once."""
    indices = set()
    for device in devices:
        if device.type == "cuda":
            indices.add(torch.cuda.current_device() if device.index is None else device.index)
    return sorted(indices)


@contextmanager
def isolated_random_state(
    seed: int | None = None, devices: Iterable[torch.device] = ()
) -> Iterator[None]:
    """Give back every generator on exit as it was on entry, whatever happens in between.

    Args:
        seed: of all these generators inside; None: they go on from where they are.
        devices: devices whose generators count too; those that are not CUDA are passed over.
    """
    numpy = sys.modules.get("numpy")
    indices = _cuda_indices(devices)
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
