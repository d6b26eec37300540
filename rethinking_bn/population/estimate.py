"""Population training: estimate the statistics that BatchNorm uses at inference, weights fixed.

Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (arXiv 2105.07576), section 3 and appendix.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from rethinking_bn.distributed import all_gather, collective_device, get_rank, get_world_size
from rethinking_bn.layers.bn_like import BatchNormLikes, find_bn_like
from rethinking_bn.numerics.moments import Moments, merge_moments
from rethinking_bn.population.forwards import (
    Autocast,
    Forward,
    PopulationRun,
    call_model,
    check_number,
    together,
)
from rethinking_bn.population.model_state import ModelState, unwrap
from rethinking_bn.population.observe import ObservedLayer, observe
from rethinking_bn.population.report import LayerReport, PopulationReport, shorten
from rethinking_bn.randomness import isolated_random_state

logger = logging.getLogger(__name__)


def estimate_population_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int | None = None,
    *,
    group: ProcessGroup | None = None,
    labelled: bool | None = None,
    autocast: Autocast | None = None,
    forward: Forward | None = None,
    seed: int | None = None,
    progress: bool = True,
    allow_empty: bool = False,
    thaw: bool = False,
) -> PopulationReport:
    """Replace the population statistics of every BN-like layer by those of ``batches``, in place.

    A layer's statistics become the exact mean and unbiased variance of all activations it sees
    while the model runs ``num_batches`` times per rank with mini-batch statistics. They are pooled
    over forwards, over the uses of a layer within a forward and over ranks, by merging (count,
    mean, M2) in float64: batches count by their number of values, and nothing cancels.

    W ranks equal one process that runs the same per-rank batches one after another (layers that
    pool nothing) or concatenated (layers that pool over ranks); every rank ends with bitwise the
    same statistics. A layer behind another BN layer sees inputs normalised by mini-batches, so its
    statistics depend on how the data was batched (Table 2). Layers with shared population
    statistics over several domains normalise by statistics pooled over them meanwhile, as inference
    will. A plain nn.BatchNorm2d that is called once per feature level cannot: only the estimate
    pools its uses.

    Estimated are the layers in training mode, found by
    :func:`rethinking_bn.layers.bn_like.find_bn_like`. Left alone and named in the report are those
    in eval mode (frozen), those of constant statistics (FrozenBatchNorm2d of any project) without
    ``thaw``, modules not known to be BatchNorm, and statistics that no value reached. Only a layer
    with a forward of its own (masked, split, ghost, norm and activation, InstanceNorm with
    statistics) knows which values count: its statistics are what it leaves in its buffers with
    momentum 1.0, batches with equal weights, the spread between them included (as in fvcore's
    PreciseBN). The report names it.

    Nothing else changes: other buffers, modes, attributes of modules, momentum and the random
    generators come back as they were. After any exception the statistics do too.

    Args:
        model: may be wrapped (data-parallel, torch.compile); the module inside runs.
        batches: inputs of the model on this rank.
        num_batches: forwards per rank, the same on all ranks. None: all batches of a loader that
            has a length; ranks of unequal length stop together, at the end of the shortest.
        group: ranks that estimate together; None: the default group, or this process alone.
        labelled: True: the model runs in the modes it is in, as in training. False: in eval mode
            with only the estimated layers in training mode, for data without labels. None: True
            unless the first batch on some rank is detectron2's dicts without ground truth.
        autocast: makes the context of each forward, such as ``lambda: torch.autocast("cuda")``;
            None: whatever autocast is active around the call.
        forward: runs ``model`` (unwrapped) on a batch; None: ``model(batch)``, or ``model(inputs)``
            for a pair of inputs and labels (:func:`rethinking_bn.population.inputs_of`).
        seed: of the random numbers that the forwards draw (each rank adds its number) and of
            modules that ask for one (``rethinking_bn.randomness``); None: the generators go on.
        progress: log a line with the expected time left every ten seconds on rank 0.
        allow_empty: where there is no layer to estimate, return an empty report, with a log line
            and without consuming a batch.
        thaw: estimate layers of constant statistics, too; they stay of their class. With their
            weights fixed, this adapts a whole detector to the domain of ``batches`` (Table 4).

    Returns:
        What was seen and how far the old statistics were off.

    Raises:
        ValueError: for a wrong ``num_batches``, or None where the loader has no length; when there
            is nothing to estimate, the statistics of a layer to thaw are folded into its weight,
            ranks disagree, a loader ends early, or the model cannot be called with what it gives.
        RuntimeError: when a loader raises (chained to what it raised), another rank failed, or
            another estimate or diagnosis of the model is running.
        FloatingPointError: when statistics are not finite, or overflow the type of their buffers;
            on all ranks, naming the layer.
        Exception: whatever the model raises. Other ranks are told, unless the model has layers
            that communicate: only the end of this process ends their wait then.
    """
    model = unwrap(model)

    def prepare() -> tuple[tuple[BatchNormLikes, list[ObservedLayer]], dict[str, Any]]:
        check_number(num_batches, batches)
        if hasattr(autocast, "__enter__"):
            raise ValueError(
                "autocast must be a function that makes a context, such as "
                "lambda: torch.autocast('cuda'), not the context itself"
            )
        found = find_bn_like(model)
        taken = ("", "constant") if thaw else ("",)
        chosen = [la for la in found.layers if la.keeps_statistics and la.frozen in taken]
        layers = [observe(layer) for layer in chosen]
        sets = [(la.layer.name, la.layer.domains, la.old[0].shape[1]) for la in layers]
        plan = {"num_batches": num_batches, "labelled": labelled, "layers in training mode": sets}
        return (found, layers), plan

    with together(model, prepare, group) as (found, layers):
        modules = [layer.module for layer in layers]
        keeping = [layer for layer in found.layers if layer.keeps_statistics]
        frozen = tuple(layer.name for layer in keeping if layer.module not in modules)
        left, world = tuple(map(str, found.left)), get_world_size(group)
        if not layers:
            why = _why_nothing(found)
            if not allow_empty:
                raise ValueError(f"population training finds nothing to estimate: {why}")
            logger.info("population training: nothing to estimate, %s", why)
            return PopulationReport((), frozen, 0, world, bool(labelled), 0.0, left)

        start = time.perf_counter()
        devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
        own_seed = None if seed is None else seed + get_rank(group)
        run = PopulationRun(
            model, modules, num_batches, group, autocast, forward or call_model, seed, progress
        )
        with isolated_random_state(own_seed, devices), torch.no_grad():
            state = ModelState(model)
            try:
                with ExitStack() as stack:
                    for layer in layers:
                        stack.enter_context(layer.observing())
                    labelled = run(batches, labelled)
                if run.done == 0:
                    raise ValueError("population training: the loader of some rank is empty")
                moments = _merge_over_ranks(layers, group)
                state.restore()
                _write(layers, moments)
            except BaseException:
                state.restore()
                raise
    reports = [r for pair in zip(layers, moments, strict=True) for r in _compare(*pair)]
    own = tuple(layer.layer.name for layer in layers if layer.layer.kind == "own")
    seconds, rows = time.perf_counter() - start, tuple(reports)
    report = PopulationReport(rows, frozen, run.done, world, labelled, seconds, left, own)
    if progress and get_rank(group) == 0:
        report.log()
    return report


def _why_nothing(found: BatchNormLikes) -> str:
    """Say what there is instead of layers to estimate, and what would include it."""
    ways = {
        "eval mode": "in eval mode: call train() before",
        "freeze_batch_norm": "frozen by freeze_batch_norm: call unfreeze_batch_norm before",
        "constant": "of constant statistics: thaw=True estimates them",
    }
    keeping = [layer for layer in found.layers if layer.keeps_statistics]
    counts = {by: sum(layer.frozen == by for layer in keeping) for by in ways}
    reasons = [f"{count} {ways[by]}" for by, count in counts.items() if count]
    parts = []
    if keeping:
        parts.append(f"all {len(keeping)} BN-like layers are frozen ({'; '.join(reasons)})")
    if without := len(found.layers) - len(keeping):
        parts.append(f"{without} BN-like layers keep no statistics (they infer by the mini-batch)")
    if found.left:
        parts.append(f"left alone: {shorten([str(layer) for layer in found.left], '; ')}")
    return "; ".join(parts) or "the model has no BN-like layer that keeps statistics"


def _merge_over_ranks(layers: list[ObservedLayer], group: ProcessGroup | None) -> list[Moments]:
    """Return every layer's moments over all ranks, on the CPU: one collective for all layers."""
    local = [layer.total().to(torch.device("cpu")) for layer in layers]
    values = [value for moments in local for value in moments]
    packed = torch.cat([value.flatten() for value in values]).to(collective_device(group))
    columns = iter(all_gather(packed, group).cpu().split([v.numel() for v in values], dim=1))
    # the same arithmetic on the same numbers: bitwise equal on every rank
    return [
        merge_moments(*(next(columns).reshape(-1, *value.shape) for value in moments))
        for moments in local
    ]


def _write(layers: list[ObservedLayer], moments: list[Moments]) -> None:
    for observed, pooled in zip(layers, moments, strict=True):
        layer = observed.layer
        layer.write(pooled)
        rows = zip(layer.domains, *pooled, *layer.read(), strict=True)
        for domain, count, mean, m2, new_mean, new_var in rows:
            name = f"{layer.name}[{domain}]" if domain else layer.name
            bad = int((~(mean.isfinite() & m2.isfinite())).sum())
            if bad:
                raise FloatingPointError(
                    f"{name}: {bad} of {len(mean)} channels saw a value that is not finite; the "
                    "old statistics are kept"
                )
            if count > 0 and not (new_mean.isfinite().all() and new_var.isfinite().all()):
                raise FloatingPointError(
                    f"{name}: the statistics overflow the type of the buffers; the old ones stay"
                )


def _compare(observed: ObservedLayer, moments: Moments) -> list[LayerReport]:
    """Measure how far each set of statistics moved."""
    layer, reports = observed.layer, []
    rows = zip(layer.domains, moments.count, *observed.old, *layer.read(), strict=True)
    for domain, count, old_mean, old_var, new_mean, new_var in rows:
        measured = (0.0, 0.0, 1.0)
        if count:
            square = layer.mean_square
            moved = old_var.sqrt() - new_var.sqrt() if square else old_mean - new_mean
            drift = moved.abs() / (new_var + layer.eps).sqrt()
            drift = torch.nan_to_num(drift, nan=math.inf, posinf=math.inf)
            ratio = ((old_var + layer.eps) / (new_var + layer.eps)).log().mean().exp()
            measured = (drift.mean().item(), drift.max().item(), ratio.item())
        reports.append(LayerReport(layer.name, domain, round(count.item()), *measured))
    return reports
