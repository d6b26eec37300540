"""Draw random numbers without disturbing whoever else does, in Python, numpy and torch.

numpy is used only where something has imported it already; without it nobody can depend on it.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

_SEEDS = 2**32  # numpy takes no larger seed


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
