"""What population training needs of a layer, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.fx import Proxy

from rethinking_bn.layers.frozen import freeze_layer, thaw_layer
from rethinking_bn.numerics.moments import Moments
from rethinking_bn.numerics.normalize import Rows, normalize
from rethinking_bn.randomness import is_recomputing

if TYPE_CHECKING:
    from typing_extensions import Self

Observer = Callable[[Moments], None]


class PopulationLayer:
    """Mixin of the layers whose inference uses population statistics.

    A forward in training mode can report its moments: an estimate needs no second pass over x.
    """

    if TYPE_CHECKING:  # TorchScript would read annotations of attributes
        _observer: Observer | None
        training: bool
        sync: bool
        process_group: ProcessGroup | None
        eps: float
        momentum: Any
    _observer = None
    _scripts_batch_statistics = False  # whether TorchScript gets those at inference, too

    def _is_observed(self) -> bool:
        """Return whether this forward is one of population training."""
        return self._observer is not None and self.training

    def _normalize(
        self,
        xs: Sequence[Tensor],
        weight: Rows,
        bias: Rows,
        parts: Sequence[int],
        pools: Sequence[int],
        holders: Sequence[Any],
    ) -> list[Tensor]:
        """Normalise by the batch; in training move the holders' statistics, or report moments."""
        observed = self._observer is not None and self.training
        outputs, local = normalize(
            xs,
            weight,
            bias,
            parts=parts,
            pools=pools,
            eps=self.eps,
            sync=self.sync and self.training,
            group=self.process_group,
            holders=holders if self.training and not observed else (),
            momentum=self.momentum,
            report=observed,
        )
        if local is not None:
            self._report(local)
        return outputs

    def _report(self, moments: Moments) -> None:
        """Tell the observer, but not of a forward that activation checkpointing recomputes."""
        if self._observer is not None and not is_recomputing():
            self._observer(moments)

    @property
    def population_domains(self) -> tuple[str, ...]:
        """The D sets of population statistics: ("",) when shared, else the level indices."""
        return ("",)

    @contextmanager
    def observing(self, observer: Observer) -> Iterator[None]:
        """Report this rank's moments to ``observer`` at every forward in training mode.

        Such a forward normalises by mini-batch statistics pooled over what inference pools over,
        and changes no buffer. The moments have one row for each population domain, of count 0
        where it saw no element.

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
        """Write D rows of moments, of any floating type, in place; rows with count 0 keep theirs.

        The variance written is the unbiased one; a row of one value per channel keeps its variance.
        """
        raise NotImplementedError


def check_eps(eps: float) -> None:
    """Raise a ValueError unless eps, which is added to a variance, is positive."""
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")


def as_leaf(layer: nn.Module, x: Proxy | Sequence[Any]) -> Any:
    """Return the call of a layer on a proxy, or a sequence with one, as one node of torch.fx."""
    first: Any = x if isinstance(x, Proxy) else next(p for p in x if isinstance(p, Proxy))
    name = first.tracer.path_of_module(layer)
    return first.tracer.create_proxy("call_module", name, (x,), {})
