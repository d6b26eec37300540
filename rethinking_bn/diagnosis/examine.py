"""``diagnose``: run a model on data, judge every BN-like layer, change nothing."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from rethinking_bn.diagnosis.distance import Scatter, exact_statistics
from rethinking_bn.diagnosis.effects import Effects, Output, output_effects
from rethinking_bn.diagnosis.judge import domain_shift, judge_layer, mixed_blocks, rank
from rethinking_bn.diagnosis.record import DiagnosedLayer, Record, Statistics, find_layers
from rethinking_bn.diagnosis.result import Diagnosis, Finding
from rethinking_bn.distributed import all_gather_object, get_rank, get_world_size
from rethinking_bn.layers.bn_like import communicates
from rethinking_bn.population.forwards import (
    Forward,
    PopulationRun,
    call_model,
    check_number,
    throwaway_event_storage,
    together,
)
from rethinking_bn.population.model_state import ModelState, unwrap
from rethinking_bn.randomness import announce_iteration, isolated_random_state

_FIRST = 4  # batches that give the constants by which every third later one runs again

logger = logging.getLogger(__name__)


def diagnose(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target_batches: Iterable[Any] | None = None,
    num_batches: int | None = None,
    forward: Forward | None = None,
    output: Output | None = None,
    group: ProcessGroup | None = None,
    labelled: bool | None = None,
    output_batches: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Diagnosis:
    """Measure what is wrong with the BatchNorm of a model, and name the remedy.

    The model runs on ``batches`` in the modes it is in, but for its BN-like layers, which normalise
    by mini-batches as in training; frozen ones (constant ones of any project, those frozen by name,
    those in eval mode within a model in training mode) use what they store. So ``batches`` should
    be training batches, of training's size, and the model in training mode if its forwards differ
    there (dropout, a detector's sampling of regions). A third of the batches run once more with all
    BN-like layers on constants: whether the samples of a batch depend on each other is judged
    where no layer mixes them.

    A finding needs both significance, by the scatter of whole batches, and effect
    (``result.LIMITS``; docs/diagnosis.md says of what). Nothing changes: buffers, modes, hooks,
    plain attributes and generators come back, after any exception too.

    Args:
        model, group, forward, labelled, progress: as for ``estimate_population_statistics``; every
            rank of the group gets the same diagnosis.
        batches: inputs of the model on this rank; 20 or more are needed to be sure of anything.
        target_batches: of the domain that the model is to be used in, as many; None: no judgement.
        num_batches: batches per rank of both; None: all, until the first rank has no more.
        output: turns what the model returns into tensors; None: the tensors in it, for detectors
            the raw outputs of their heads.
        output_batches: kept for the effects on the output, of all layers and of the worst eight
            alone; 0: no such effects.
        seed: of the random numbers the forwards draw.

    Raises:
        ValueError: for fewer than two batches, a lazy layer, a loader that has no length and no
            ``num_batches`` or ends before them, or when the ranks' models differ.
        Exception: what the model, a loader or another rank raises; see
            ``estimate_population_statistics``.
    """
    start, model = time.perf_counter(), unwrap(model)

    def prepare() -> tuple[tuple[list[DiagnosedLayer], tuple[str, ...]], dict[str, Any]]:
        for loader in (batches, batches if target_batches is None else target_batches):
            check_number(num_batches, loader, least=2)
        layers, left = find_layers(model)
        told = [(layer.name, layer.channels, layer.rows, layer.frozen) for layer in layers]
        return (layers, left), {"BN-like layers, or which are frozen": told}

    with together(model, prepare, group) as (layers, left):
        world = get_world_size(group)
        if not layers:
            what = f": {'; '.join(left)}" if left else " (scripted ones cannot be seen)"
            logger.warning("diagnosis: the model has no BN-like layer that can be judged%s", what)
            return Diagnosis((), (), 0, world, 0.0, left=left)
        session = Session(model, layers, forward or call_model, group, seed, progress)
        with isolated_random_state(seed + get_rank(group), session.devices), torch.no_grad():
            records, scatters, kept = session.observe(
                batches, num_batches, labelled, output_batches, again=True
            )
            findings = list(mixed_blocks(layers))
            for layer in layers:
                calls, summaries = zip(*(r[layer.name] for r in scatters), strict=True)
                idle = session.constants is not None and not any(calls)
                findings += judge_layer(layer, records[layer.name], summaries, idle=idle)
            targets: dict[str, Record] = {}
            if target_batches is not None:
                targets, _, _ = session.observe(target_batches, num_batches, labelled, 0)
                for layer in layers:
                    findings += domain_shift(layer, targets[layer.name])
            if kept:
                effects = Effects(session, kept, output)
                try:
                    findings = output_effects(effects, records, targets, findings)
                finally:
                    session.state.restore()
    count = max(record.forwards for record in records.values())
    ways = _Remedies(model, layers, count // world, forward is not None)
    findings = [ways.given_to(finding) for finding in findings]
    depth = {layer.name: layer.depth for layer in layers}
    findings.sort(key=lambda f: (*rank(f), depth.get(f.layer, -1)))
    unreached = tuple(name for name in depth if records[name].uses == 0)
    if unreached:
        logger.warning("diagnosis: layers that no value reached: %s", ", ".join(unreached))
    seconds = time.perf_counter() - start
    return Diagnosis(tuple(findings), tuple(depth), count, world, seconds, unreached, left)


_REMEDIES = {
    "block": "freeze or thaw the layers of a block alike: `freeze_batch_norm(model)`",
    "momentum": "train with momentum 0.01, or {estimate}",
    "stale-statistics": "{estimate}",
    "mixed-modes": "freeze these layers only after this: {estimate}",
    "identity-statistics": "load the statistics that belong to these weights, or {estimate}",
    "impossible-variance": "load the statistics again, or {estimate}",
    "non-finite": "find what makes the first such layer's input infinite (learning rate, overflow "
    "in half precision); then {estimate}",
    "dead-channels": "look at what feeds these channels (zero filters, dead ReLUs), prune them, or "
    "{estimate}",
    "small-batch": "more images in a normalisation batch, on several GPUs `convert_norms(model, "
    '"SyncBN")`; or `freeze_batch_norm(model)` near the end of training; or GN, MABN, mini-batch '
    "statistics at inference",
    "dependent-samples": "shuffle the loader: the images of a batch should have nothing in common",
    "output-effect": "mend the layers above first, or {estimate}",
}


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


class _Remedies:
    """What to do about findings in this model.

    Code stands between backticks. It runs with the package's public names imported and ``model``,
    ``batches``, ``target_batches`` and ``forward`` as diagnose got them.
    """

    def __init__(
        self, model: nn.Module, layers: list[DiagnosedLayer], batches: int, forward: bool
    ) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.model = "model" if model.training else "model.train()"
        self.rest = f"{batches}, forward=forward" if forward else f"{batches}"
        self.retinanet = any("RetinaNet" in kind.__name__ for kind in type(model).__mro__)
        self.thaw = any(layer.about.frozen == "constant" for layer in layers)
        self.noisy = max((layer.momentum or 0.0 for layer in layers), default=0.0) > 0.1

    def given_to(self, finding: Finding) -> Finding:
        """Return the finding with its remedy, unless it is "ok"."""
        layer, what = self.layers.get(finding.layer), finding.what
        if finding.severity == "ok":
            return finding
        if finding.kind != "repeated-use" or layer is None:
            return dataclasses.replace(finding, remedy=self._remedy(finding, layer))
        size, rows = f"{layer.channels}, {finding.evidence['uses']}", ""
        if self.retinanet:
            own_affine = getattr(layer.layer, "affine", "") == "domain_specific"
            row = "row 2" if not layer.apart else "row 5" if own_affine else "row 3"
            what = f"{row} of the paper's Table 5: {what}"
            rows = " (rows 1, 4 or 6 of the paper's Table 5)"
        alike = 'train_stats="domain_specific", population_stats="domain_specific"'
        remedy = f"train and infer alike{rows}: `MultiDomainBatchNorm2d({size}, {alike})`"
        if isinstance(layer.layer, nn.modules.batchnorm._BatchNorm):
            remedy = (
                f"give each use statistics of its own: `CycleBatchNorm2d({size})` where the layer "
                f"is called once per use, `SplitBatchNorm2d({size})` where the uses are rows of "
                f"one batch, `MultiDomainBatchNorm2d({size})` where they are a list"
            )
        return dataclasses.replace(finding, what=what, remedy=remedy)

    def _estimate(self, more: str = "", batches: str = "batches", model: str = "") -> str:
        model = model or self.model
        return f"`estimate_population_statistics({model}, {batches}, {self.rest}{more})`"

    def _remedy(self, finding: Finding, layer: DiagnosedLayer | None) -> str:
        kind, cause, estimate = finding.kind, finding.evidence.get("cause"), self._estimate()
        concerned = self.layers.values() if layer is None else [layer]
        states = {each.about.frozen if each.frozen else "" for each in concerned}
        frozen = states.pop() if len(states) == 1 else ""
        if frozen == "constant" and kind == "identity-statistics":  # never estimated in place
            again = self._estimate(model="model.train()")
            estimate = f'`convert_norms(model, "BN")`, {again}'
        elif frozen == "constant":
            estimate = self._estimate(", thaw=True")
        elif frozen == "freeze_batch_norm":
            estimate = f"`unfreeze_batch_norm(model)`, {estimate}, `freeze_batch_norm(model)`"
        elif frozen:
            name = f"model.get_submodule({finding.layer!r})"
            estimate = f"`{name}.train()`, {estimate}, `{name}.eval()`"
        if kind == "domain-shift":
            more = ", labelled=False" + ", thaw=True" * self.thaw
            return "estimate the target's statistics: " + self._estimate(more, "target_batches")
        if kind == "dependent-samples" and "roi_heads" in finding.layer:
            return "shuffle RoIs over ranks (ShuffleBNBoxHead, ShuffleBNMaskHead)"
        if kind == "output-effect" and self.noisy:
            cause = "momentum"
        return _REMEDIES[cause or kind].format(estimate=f"estimate the statistics: {estimate}")
