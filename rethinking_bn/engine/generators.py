"""The global random generators of python, numpy and torch, seeded and put back together."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Seed python's, numpy's and torch's global generators (CPU and every GPU).

    Args:
        seed: in [0, 2**64); numpy takes its lower 32 bits.
    """
    _seed_host_generators(seed)
    torch.cuda.manual_seed_all(seed)  # waits for the first use of CUDA if there was none yet


@contextmanager
def isolated_generators(seed: int) -> Iterator[None]:
    """Run a block on freshly seeded host generators, and put their states back at its end.

    What happens inside depends on the seed alone, and what happens after does not notice. GPU
    generators are left alone: this is for loading data, also in worker processes.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    _seed_host_generators(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def _seed_host_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
