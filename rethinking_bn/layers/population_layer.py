"""What population training needs of a layer, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.fx import Proxy

from rethinking_bn.layers.frozen import freeze_layer, thaw_layer
from rethinking_bn.numerics.moments import Moments
from rethinking_bn.randomness import is_recomputing

if TYPE_CHECKING:
    from typing_extensions import Self

Observer = Callable[[Moments], None]


class PopulationLayer:
    """Mixin of the layers whose inference uses population statistics.

    A forward in training mode reports what it computed anyway, so estimating a population costs
    no second pass over the activations.
    """

    if TYPE_CHECKING:  # TorchScript would read annotations of attributes
        _observer: Observer | None
    _observer = None
    _scripts_batch_statistics = False  # whether TorchScript gets those at inference, too

    def _is_observed(self) -> bool:
        """Return whether this forward is one of population training."""
        return self._observer is not None and bool(getattr(self, "training", False))

    def _report(self, moments: Moments | None) -> None:
        """Tell the observer, but not of a forward that activation checkpointing recomputes."""
        if moments is not None and self._observer is not None and not is_recomputing():
            self._observer(moments)

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
        # nobody observes a copy, and what compile_norms made computes with the layer itself
        left_out = ("_observer", "_compiled_call_impl", "_normalize_level", "_run")
        return {key: value for key, value in vars(self).items() if key not in left_out}

    def __prepare_scriptable__(self) -> Any:
        # called by torch.jit.script for every module of a model
        if getattr(self, "training", False):
            raise ValueError(
                f"{type(self).__name__} can be scripted for inference only: call eval() on the "
                "model before torch.jit.script"
            )
        if getattr(self, "batch_stats_at_inference", False) and not self._scripts_batch_statistics:
            raise ValueError(
                f"{type(self).__name__} cannot be scripted while batch_statistics(model) makes it "
                "normalise by the mini-batch"
            )
        return self

    def freeze(self, *, affine: bool = False) -> Self:
        """Normalise by the population statistics from now on, and leave them as they are.

        Whatever ``train()`` says, in copies and pickles as well, but not in the state dict. To
        freeze all layers of a model, torch's included: ``population.freeze_batch_norm``.

        Args:
            affine: freeze weight and bias, too (``requires_grad`` False).
        """
        assert isinstance(self, nn.Module)  # for the type checker
        self.check_can_change_mode("freeze()")
        freeze_layer(self, affine=affine)
        return self

    def unfreeze(self) -> Self:
        """Undo :meth:`freeze`: the mode is the one last asked for, the affine as it was."""
        assert isinstance(self, nn.Module)  # for the type checker
        thaw_layer(self)
        return self

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


def check_eps(eps: float) -> None:
    """Raise a ValueError unless eps, which is added to a variance, is positive."""
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")


def as_leaf(layer: nn.Module, x: Proxy | Sequence[Any]) -> Any:
    """Return the result of calling ``layer`` as one node of torch.fx's graph, as of torch's layers.

    Args:
        x: its argument, a proxy or a sequence with one.
    """
    first: Any = x if isinstance(x, Proxy) else next(p for p in x if isinstance(p, Proxy))
    name = first.tracer.path_of_module(layer)
    return first.tracer.create_proxy("call_module", name, (x,), {})
