"""The forwards of a diagnosis: each starts from the same state, which comes back at the end."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from rethinking_bn.diagnosis.distance import Scatter, exact_statistics
from rethinking_bn.diagnosis.record import DiagnosedLayer, Record, Statistics
from rethinking_bn.distributed import all_gather_object, get_rank, get_world_size
from rethinking_bn.layers.bn_like import communicates
from rethinking_bn.population.forwards import Forward, PopulationRun, throwaway_event_storage
from rethinking_bn.population.model_state import ModelState
from rethinking_bn.randomness import announce_iteration, isolated_random_state

_FIRST = 4  # batches that give the constants by which every third later one runs again


@dataclass
class Session:
    """A model under diagnosis, the state that its forwards start from, and how they are run."""

    model: nn.Module
    layers: list[DiagnosedLayer]
    forward: Forward
    group: ProcessGroup | None
    seed: int
    progress: bool
    constants: dict[str, Statistics] | None = None  # by layer, once a batch has run by them
    _eval_only: bool = False

    def __post_init__(self) -> None:
        self.state = ModelState(self.model)
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self.devices = {tensor.device for tensor in tensors}

    def observe(
        self, batches: Iterable[Any], num_batches: int | None, labelled: bool | None, keep: int,
        again: bool = False,
    ) -> tuple[dict[str, Record], list[dict[str, Any]], list[Any]]:  # fmt: skip
        """Run every batch with mini-batch statistics, and a third of them with constant ones.

        Return by layer the record of all ranks; of each rank, by layer, whether it was called by
        constants and how its batch means scatter there; the first batches.
        """
        records = {layer.name: Record(layer) for layer in self.layers}
        scatters = {layer.name: Scatter(layer) for layer in self.layers}
        kept: list[Any] = []

        def forward(model: nn.Module, batch: Any) -> None:
            if len(kept) < keep:
                kept.append(batch)
            self._run(records, batch)
            if again and run.done >= _FIRST and (run.done - _FIRST) % 3 == 0:
                self._run_by_constants(records, scatters, batch)

        run = PopulationRun(
            self.model, [layer.layer for layer in self.layers], num_batches, self.group, None,
            forward, self.seed, self.progress, title="diagnosis",
        )  # fmt: skip
        try:
            with ExitStack() as stack:
                for layer in self.layers:
                    if not layer.frozen:
                        layer.set_training(True)
                    stack.enter_context(layer.watching())
                self._eval_only = not run(batches, labelled)
        finally:
            self.state.restore()
        states = all_gather_object({name: r.state() for name, r in records.items()}, self.group)
        for name, record in records.items():
            record.merge([state[name] for state in states])
        if max(record.forwards for record in records.values()) < 2:
            raise ValueError("a diagnosis needs at least two batches, better twenty or more")
        told = {name: (s.called, s.summary()) for name, s in scatters.items() if again}
        return records, all_gather_object(told, self.group), kept

    def _run(self, records: dict[str, Any], batch: Any) -> None:
        for layer in self.layers:
            layer.record = records[layer.name]
        try:
            self.forward(self.model, batch)
        finally:
            for record in records.values():
                record.end_of_forward()

    def _run_by_constants(
        self, records: dict[str, Record], scatters: dict[str, Scatter], batch: Any
    ) -> None:
        """Run a batch with all layers on the statistics of the first few batches."""
        if self.constants is None:  # any would do; these keep activations in their place
            self.constants = {}
            for layer in self.layers:
                record = Record(layer).merge([records[layer.name].state()])
                if record.uses and not layer.frozen:
                    self.constants[layer.name] = exact_statistics(layer, record)
        with ExitStack() as stack:
            for layer in self.layers:
                if layer.name in self.constants:
                    stack.enter_context(layer.using(self.constants[layer.name]))
            try:
                self._run(scatters, batch)
            except FloatingPointError:  # of a model that refuses what is not finite
                if self.ranks_wait():
                    raise
                for scatter in scatters.values():  # nobody knows whom it would have called
                    scatter.called = True

    def restore(self) -> None:
        """Put the model back to what its forwards start from."""
        self.state.restore()
        if self._eval_only:
            for module in self.model.modules():
                module.training = False

    def run_again(self, index: int, batch: Any) -> Any:
        """Run one batch outside the observation, with the random numbers of its number."""
        seed = self.seed + get_rank(self.group) + index
        with isolated_random_state(seed, self.devices), throwaway_event_storage():
            announce_iteration(self.model, self.seed, index)
            return self.forward(self.model, batch)

    def ranks_wait(self) -> bool:
        """Return whether ranks wait for each other in a forward, in the modes that hold now."""
        modules = (module for module in self.model.modules() if module.training)
        return get_world_size(self.group) > 1 and any(map(communicates, modules))
