"""``diagnose``: run a model on data, judge every BN-like layer, change nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from rethinking_bn.diagnosis.effects import Output, Variants
from rethinking_bn.diagnosis.judge_layer import judge_layer
from rethinking_bn.diagnosis.judge_output import output_effects
from rethinking_bn.diagnosis.judge_together import domain_shift, mixed_blocks
from rethinking_bn.diagnosis.layers import DiagnosedLayer, find_layers
from rethinking_bn.diagnosis.record import Record
from rethinking_bn.diagnosis.result import Diagnosis
from rethinking_bn.distributed import all_gather_object, get_rank, get_world_size
from rethinking_bn.population.forwards import Forward, PopulationRun, throwaway_event_storage
from rethinking_bn.population.model_state import ModelState, unwrap
from rethinking_bn.randomness import announce_iteration, isolated_random_state

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
    by mini-batches as in training whatever mode they are in; frozen ones (FrozenBatchNorm2d, those
    frozen by name, those in eval mode within a model in training mode) use what they store. So
    ``batches`` should be training batches, of training's size, and the model in training mode if
    it needs that to be run as in training (dropout, a detector's sampling of regions).

    **A finding needs both significance and effect.** Standard errors come from the scatter of
    whole batches, never from counts of pixels. A channel counts when it is more than 5 standard
    errors off (Student's t over batches, turned into a z), or all channels together when the root
    mean square of their z is more than 4 (for dependent-samples, when the mean of their F is 4
    standard errors above 1). Among the channels that count, the root mean square of the effect
    gives the severity:

    ====================  ==============================================  =====  =======  ======
    kind                  effect                                           note  warning  severe
    ====================  ==============================================  =====  =======  ======
    stale-statistics,     sqrt(d² + (g - 1)²): the stored mean's distance  0.05    0.15     0.5
    identity-statistics,  d in standard deviations and the ratio g of
    mixed-modes (frozen), these; SE² = scatter · (1/B + m / (2 - m)), the
    domain-shift          second for the moving average's own error
    repeated-use          the same between one use's and all uses'         0.05    0.15     0.4
                          moments, tests paired over batches
    dependent-samples     batch means' scatter beyond N independent        0.02    0.1      0.3
                          images', in standard deviations of the values
    small-batch           independent samples in a normalisation batch     < 64    < 16     < 4
    dead-channels         variance below eps / 1000: share of channels,    any     25 %,    0.5 and
                          or offset of what inference makes of them                0.15     5 %
    impossible-variance,  any channel                                      --      --       any
    non-finite
    mixed-modes (block)   some layers of a block frozen, others not        any     --       --
    output-effect (all)   change of the output from stored to exact        --      0.1      0.3
                          statistics, if more than 3 times what chance
                          gives; to mini-batch ones: note 0.5, warning 1
    output-effect (one)   the same of one layer that has another finding   0.02    0.1      0.3
    ====================  ==============================================  =====  =======  ======

    Output changes are in units of the output's standard deviation. A finding stays severe
    only if its layer alone changes the output by 0.1 or more, where that was measured: what is too
    weak to matter is a warning. Chance is how far half of the batches' exact statistics take the
    output, scaled by the standard errors above. "small-batch" and "dependent-samples" judge the
    batches that are given, and a layer that pools over ranks by the ranks there are now.

    Nothing changes: buffers, modes, hooks, plain attributes and generators come back, after any
    exception too. Batches with non-finite activations count as "non-finite" and nowhere else.

    Args:
        model: may be wrapped in DistributedDataParallel, DataParallel or torch.compile.
        batches: inputs of the model on this rank; 20 or more are needed to be sure of anything.
        target_batches: of the domain that the model is to be used in, as many; None: no judgement.
        num_batches: batches per rank of both; None: all, until the first rank has no more.
        forward: runs ``model`` (unwrapped) on a batch; None: ``model(batch)``, or
            ``model(inputs)`` for a pair of inputs and a tensor of integer labels.
        output: turns what the model returns into tensors; None: the tensors in it, for detectors
            the raw outputs of their heads.
        group: ranks that diagnose together; None: the default group, or this process alone. Every
            rank gets the same diagnosis.
        labelled: as for ``estimate_population_statistics``.
        output_batches: batches kept for the output effects, which take about as many forwards as
            there are batches, the worst layers first (with few batches more, as every severe
            finding is weighed by what its layer alone does); 0: no output effects.
        seed: of the random numbers the forwards draw.
        progress: log a line every ten seconds on rank 0.

    Raises:
        ValueError: for fewer than two batches, a lazy layer, or a loader that ends before
            ``num_batches``; when the ranks' models differ.
        Exception: what the model, a loader or another rank raises; see
            ``estimate_population_statistics``.
    """
    start = time.perf_counter()
    if num_batches is not None and (isinstance(num_batches, bool) or num_batches < 2):
        raise ValueError(f"num_batches must be at least 2, or None for all, got {num_batches!r}")
    model = unwrap(model)
    layers = find_layers(model)
    _agree_on_layers(layers, group)
    if not layers:
        logger.warning("diagnosis: the model has no BN-like layer (scripted ones cannot be seen)")
        return Diagnosis((), (), 0, get_world_size(group), 0.0)
    session = _Session(
        model, layers, forward or _call, group=group, seed=seed, progress=progress,
        labelled=labelled, num_batches=num_batches,
    )  # fmt: skip
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    with isolated_random_state(seed + get_rank(group), devices), torch.no_grad():
        try:
            records, kept = session.observe(batches, output_batches)
            findings = [f for layer in layers for f in judge_layer(layer, records[layer.name])]
            findings += mixed_blocks(layers)
            targets: dict[str, Record] = {}
            if target_batches is not None:
                targets, _ = session.observe(target_batches, 0)
                findings += domain_shift(layers, targets)
            if kept and output_batches:
                ranks = get_world_size(group)
                variants = Variants(
                    model, layers, kept, session.run_again, session.restore, output, ranks
                )
                budget = max(r.forwards for r in records.values()) // ranks
                findings = output_effects(
                    variants, layers, records, targets, findings, budget, group
                )
        finally:
            session.state.restore()
    forwards = max(record.forwards for record in records.values())
    order = {layer.name: layer.depth for layer in layers}
    findings.sort(key=lambda f: (*f.rank, order.get(f.layer, -1)))
    unreached = tuple(layer.name for layer in layers if records[layer.name].uses == 0)
    if unreached:
        logger.warning("diagnosis: layers that no value reached: %s", ", ".join(unreached))
    return Diagnosis(
        tuple(findings),
        tuple(layer.name for layer in layers),
        forwards,
        get_world_size(group),
        time.perf_counter() - start,
        unreached,
    )


class _Session:
    """The state that every forward of a diagnosis starts from, and how it is run."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[DiagnosedLayer],
        forward: Forward,
        *,
        group: ProcessGroup | None,
        seed: int,
        progress: bool,
        labelled: bool | None,
        num_batches: int | None,
    ) -> None:
        self.model, self.layers, self.forward = model, layers, forward
        self.group, self.seed, self.progress = group, seed, progress
        self.labelled, self.num_batches = labelled, num_batches
        self.state = ModelState(model)
        self.devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
        self._eval_only = False

    def observe(self, batches: Iterable[Any], keep: int) -> tuple[dict[str, Record], list[Any]]:
        """Run every batch with mini-batch statistics; return the merged records, first batches."""
        records = {layer.name: Record(layer) for layer in self.layers}
        kept: list[Any] = []

        def forward(model: nn.Module, batch: Any) -> None:
            if len(kept) < keep:
                kept.append(batch)
            self.forward(model, batch)
            for record in records.values():
                record.end_of_forward()

        try:
            with ExitStack() as stack:
                for layer in self.layers:
                    layer.normalise_by_batch()
                    stack.enter_context(records[layer.name].watching())
                run = PopulationRun(
                    self.model,
                    [layer.layer for layer in self.layers],
                    self.num_batches,
                    group=self.group,
                    autocast=nullcontext,
                    forward=forward,
                    seed=self.seed,
                    progress=self.progress,
                    title="diagnosis",
                )
                self._eval_only = not run(batches, self.labelled)
        finally:
            self.state.restore()
        states = all_gather_object({n: r.state() for n, r in records.items()}, self.group)
        for name, record in records.items():
            record.merge([state[name] for state in states])
        if max(record.forwards for record in records.values()) < 2:
            raise ValueError("a diagnosis needs at least two batches, better twenty or more")
        return records, kept

    def restore(self) -> None:
        """Put the model back to what its forwards start from."""
        self.state.restore()
        if self._eval_only:
            for module in self.model.modules():
                module.training = False

    def run_again(self, index: int, batch: Any) -> Any:
        """Run one batch outside the observation, with the random numbers of its number."""
        seed = self.seed + get_rank(self.group)
        with isolated_random_state(seed + index, self.devices), throwaway_event_storage():
            announce_iteration(self.model, self.seed, index)
            return self.forward(self.model, batch)


def _call(model: nn.Module, batch: Any) -> Any:
    inputs = batch
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        labels = batch[1]
        if isinstance(labels, torch.Tensor) and not labels.is_floating_point():
            inputs = batch[0]
    try:
        return model(inputs)
    except (TypeError, AssertionError, ValueError, AttributeError):
        logger.error(
            "the model cannot be called with a batch as it comes (%s): diagnose's forward= says "
            "how, as forward=rethinking_bn.torchvision.run_detector for torchvision's detectors",
            type(batch).__name__,
        )
        raise


def _agree_on_layers(layers: Sequence[DiagnosedLayer], group: ProcessGroup | None) -> None:
    told = [(layer.name, layer.channels, layer.rows, layer.frozen) for layer in layers]
    everyone = all_gather_object(told, group)
    if any(other != everyone[0] for other in everyone):
        raise ValueError("the ranks disagree about the model's BN-like layers or which are frozen")
