"""What population training needs of a layer, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from rethinking_bn.numerics.moments import Moments

Observer = Callable[[Moments], None]


class PopulationLayer:
    """Mixin of the layers whose inference uses population statistics.

    A forward in training mode reports what it computed anyway, so estimating a population costs
    no second pass over the activations.
    """

    _observer: Observer | None = None

    @property
    def population_domains(self) -> tuple[str, ...]:
        """The D sets of population statistics: ("",) when shared, else the level indices."""
        return ("",)

    @contextmanager
    def observing(self, observer: Observer) -> Iterator[None]:
        """Report this rank's moments to ``observer`` at every forward in training mode.

        While open, such a forward normalises by mini-batch statistics in the population paradigm
        (pooled over what inference pools over), and no buffer changes. The moments have one row
        per population domain; rows that saw no element have count 0.

        Raises:
            RuntimeError: when the layer is being observed already.
        """
        if self._observer is not None:
            raise RuntimeError(f"{type(self).__name__} is being observed already")
        self._observer = observer
        try:
            yield
        finally:
            # deleting restores the class attribute: nothing is left in the instance
            del self._observer

    def __getstate__(self) -> dict[str, Any]:
        # nobody observes a copy
        return {key: value for key, value in vars(self).items() if key != "_observer"}

    def check_can_change_mode(self, where: str) -> None:
        """Raise a RuntimeError, naming ``where``, when another mode would mix up statistics."""

    def read_population(self) -> tuple[Tensor, Tensor]:
        """Return the population mean and variance, each (D, C), copies of the buffers."""
        raise NotImplementedError

    def write_population(self, moments: Moments) -> None:
        """Write population statistics in place; rows with count 0 keep theirs.

        Args:
            moments: D rows, any floating type. The variance written is the unbiased one; a row of
                one value per channel has none, and keeps the variance it had.
        """
        raise NotImplementedError
