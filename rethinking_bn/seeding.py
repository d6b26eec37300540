"""Seeds as pure functions of where a run stands, so that resuming needs no saved generators.

The protocol for modules that draw random numbers of their own (the shuffling heads do): a method
``set_iteration(run_seed: int, iteration: int) -> None``. Our trainer calls it on every module
that has one, on every rank, before each training step; with :func:`derive_seed` of the two and
of a counter of calls since then, the module draws the same numbers in a resumed run. Under a
trainer that does not call it, the module falls back to what it can know of the iteration.
"""

from __future__ import annotations

import hashlib
from typing import Protocol, runtime_checkable

from torch import nn


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
