"""Population training: estimate the statistics that BatchNorm uses at inference, weights fixed.

Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (arXiv 2105.07576), section 3 and appendix.
"""

from __future__ import annotations

import logging
import math
import operator
import textwrap
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any, SupportsIndex

import torch
from torch import nn
from torch.distributed import ProcessGroup

from rethinking_bn.distributed import (
    all_gather,
    all_gather_object,
    collective_device,
    get_rank,
    get_world_size,
)
from rethinking_bn.layers.bn_like import BatchNormLikes, find_bn_like
from rethinking_bn.numerics.moments import Moments, merge_moments
from rethinking_bn.population.forwards import Autocast, Forward, PopulationRun, call_model
from rethinking_bn.population.model_state import ModelState, exclusive, unwrap
from rethinking_bn.population.observe import ObservedLayer, observe
from rethinking_bn.population.report import LayerReport, PopulationReport, shorten
from rethinking_bn.randomness import isolated_random_state

__all__ = ["LayerReport", "PopulationReport", "estimate_population_statistics"]

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
    statistics depend on how the data was batched (Table 2); the first one's do not.

    Layers with shared population statistics over several domains normalise by statistics pooled
    over them meanwhile, as inference will. A plain nn.BatchNorm2d that is called once per feature
    level cannot: only the estimate pools its uses.

    Estimated are the layers in training mode when this is called, found by
    :func:`rethinking_bn.layers.bn_like.find_bn_like`. Left alone and named in the report are those
    in eval mode (frozen), those of constant statistics (FrozenBatchNorm2d of any project) without
    ``thaw``, modules not known to be BatchNorm, and statistics that no value reached. Of a layer
    with a forward of its own (masked, split, ghost, norm and activation, InstanceNorm with
    statistics) only the layer knows which values count: its statistics are what it leaves in its
    buffers with momentum 1.0, batch after batch with equal weights, the spread between batches
    included (as in fvcore's PreciseBN). The report names it.

    Nothing else changes: other buffers, modes, attributes of modules, momentum and the random
    generators come back as they were. After any exception the statistics do too.

    Args:
        model: may be wrapped (data-parallel, torch.compile); the module inside runs.
        batches: inputs of the model on this rank. At most ``num_batches`` are taken.
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
        allow_empty: return an empty report, with a log line and without consuming a batch, where
            otherwise a ValueError says that there is no layer to estimate.
        thaw: estimate layers of constant statistics, too; they stay of their class. With their
            weights fixed, this adapts a whole detector to the domain of ``batches`` (Table 4).

    Returns:
        What was seen and how far the old statistics were off.

    Raises:
        ValueError: for a wrong ``num_batches``, or None where the loader has no length; when there
            is nothing to estimate, when the statistics of a layer to thaw are folded into its
            weight, when ranks disagree, when a loader ends early (on all ranks, naming the rank),
            or when the model cannot be called with what the loader gives.
        RuntimeError: when a loader raises (chained to what it raised), another rank failed, or
            another estimate or diagnosis of the model is running.
        FloatingPointError: when statistics are not finite, or overflow the type of their buffers;
            on all ranks, naming the layer.
        Exception: whatever the model raises. Other ranks are told, unless the model has layers
            that communicate: only the end of this process ends their wait then.
    """
    model = unwrap(model)
    with exclusive(model):
        found, layers = _agree_on_plan(model, batches, num_batches, autocast, labelled, group, thaw)
        chosen = {layer.module for layer in layers}
        rest = [layer for layer in found.layers if layer.module not in chosen]
        frozen = tuple(layer.name for layer in rest if layer.keeps_statistics)
        left = tuple(map(str, found.left))
        world = get_world_size(group)
        if not layers:
            why = _why_nothing(found)
            if not allow_empty:
                raise ValueError(f"population training finds nothing to estimate: {why}")
            logger.info("population training: nothing to estimate, %s", why)
            return PopulationReport((), frozen, 0, world, bool(labelled), 0.0, left)

        start = time.perf_counter()
        devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
        own_seed = None if seed is None else seed + get_rank(group)
        with isolated_random_state(own_seed, devices), torch.no_grad():
            state = ModelState(model)
            try:
                run = PopulationRun(
                    model, [layer.module for layer in layers], num_batches, group,
                    autocast or nullcontext, forward or call_model, seed, progress,
                )  # fmt: skip
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
    reports = [
        report
        for layer, pooled in zip(layers, moments, strict=True)
        for report in _compare(layer, pooled)
    ]
    report = PopulationReport(
        *(tuple(reports), frozen, run.done, world, labelled, time.perf_counter() - start, left),
        from_buffers=tuple(layer.layer.name for layer in layers if layer.layer.kind == "own"),
    )
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
    without = len(found.layers) - len(keeping)
    if without:
        parts.append(f"{without} BN-like layers keep no statistics (they infer by the mini-batch)")
    if found.left:
        parts.append(f"left alone: {shorten([str(layer) for layer in found.left], '; ')}")
    return "; ".join(parts) or "the model has no BN-like layer that keeps statistics"


def _agree_on_plan(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int | None,
    autocast: Autocast | None,
    labelled: bool | None,
    group: ProcessGroup | None,
    thaw: bool,
) -> tuple[BatchNormLikes, list[ObservedLayer]]:
    """Check the arguments here and against the other ranks', in one exchange."""
    error: Exception | None = None
    layers: list[ObservedLayer] = []
    found = BatchNormLikes([], [])
    try:
        _check_number(num_batches, batches)
        if hasattr(autocast, "__enter__"):
            raise ValueError(
                "autocast must be a function that makes a context, such as "
                "lambda: torch.autocast('cuda'), not the context itself"
            )
        found = find_bn_like(model)
        taken = ("", "constant") if thaw else ("",)
        layers = [
            observe(layer)
            for layer in found.layers
            if layer.keeps_statistics and layer.frozen in taken
        ]
    except Exception as raised:
        error = raised
    message = None if error is None else f"{type(error).__name__}: {error}"
    sets = [(layer.layer.name, layer.layer.domains, layer.old[0].shape[1]) for layer in layers]
    plans = all_gather_object((message, num_batches, labelled, sets), group)
    if error is not None:
        raise error
    for rank, (failure, *_) in enumerate(plans):
        if failure is not None:
            raise ValueError(f"population training cannot start: rank {rank}: {failure}")
    for index, what in ((1, "num_batches"), (2, "labelled"), (3, "layers in training mode")):
        values = [plan[index] for plan in plans]
        if any(value != values[0] for value in values):
            said = [f"rank {r}: {textwrap.shorten(repr(v), 300)}" for r, v in enumerate(values)]
            raise ValueError(f"ranks disagree about {what}: {'; '.join(said)}")
    return found, layers


def _check_number(num_batches: Any, batches: Any) -> None:
    if num_batches is None:
        try:
            len(batches)
        except TypeError as error:  # an iterator, or a DataLoader over an iterable data set
            raise ValueError(
                f"num_batches is None, but the loader ({type(batches).__name__}) has no length: "
                "say how many batches to take"
            ) from error
    elif (
        isinstance(num_batches, bool)
        or not isinstance(num_batches, SupportsIndex)
        or operator.index(num_batches) < 1
    ):
        raise ValueError(f"num_batches must be a positive integer, got {num_batches!r}")


def _merge_over_ranks(layers: list[ObservedLayer], group: ProcessGroup | None) -> list[Moments]:
    """Return every layer's moments over all ranks, on the CPU: one collective for all layers."""
    local = [layer.moments.total().to(torch.device("cpu")) for layer in layers]
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
        names = [f"{layer.name}[{d}]" if d else layer.name for d in layer.domains]
        for name, mean, m2 in zip(names, pooled.mean, pooled.m2, strict=True):
            bad = int((~(mean.isfinite() & m2.isfinite())).sum())
            if bad:
                raise FloatingPointError(
                    f"{name}: {bad} of {len(mean)} channels saw a value that is not finite; the "
                    "old statistics are kept"
                )
        layer.write(pooled)
        for name, count, mean, var in zip(names, pooled.count, *layer.read(), strict=True):
            if count > 0 and not (mean.isfinite().all() and var.isfinite().all()):
                raise FloatingPointError(
                    f"{name}: the statistics overflow the type of the buffers; the old ones stay"
                )


def _compare(observed: ObservedLayer, moments: Moments) -> Iterator[LayerReport]:
    """Measure how far each set of statistics moved."""
    layer = observed.layer
    rows = zip(layer.domains, moments.count, *observed.old, *layer.read(), strict=True)
    for domain, count, old_mean, old_var, new_mean, new_var in rows:
        if count == 0:
            yield LayerReport(layer.name, domain, 0, 0.0, 0.0, 1.0)
            continue
        square = layer.mean_square
        moved = old_var.sqrt() - new_var.sqrt() if square else old_mean - new_mean
        drift = moved.abs() / (new_var + layer.eps).sqrt()
        drift = torch.nan_to_num(drift, nan=math.inf, posinf=math.inf)
        ratio = ((old_var + layer.eps) / (new_var + layer.eps)).log().mean().exp()
        measured = (drift.mean().item(), drift.max().item(), ratio.item())
        yield LayerReport(layer.name, domain, round(count.item()), *measured)
