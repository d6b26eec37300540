"""Population training: estimate the statistics that BatchNorm uses at inference, weights fixed.

Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (arXiv 2105.07576), section 3 and appendix.
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

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
from rethinking_bn.numerics.moments import Moments, merge_moments
from rethinking_bn.population.forwards import Autocast, Forward, PopulationRun
from rethinking_bn.population.model_state import ModelState, unwrap
from rethinking_bn.population.observers import (
    ObservedLayer,
    ThawedLayer,
    find_population_layers,
    named_frozen_layers,
    observe,
)
from rethinking_bn.population.report import LayerReport, PopulationReport, compare
from rethinking_bn.randomness import isolated_random_state

__all__ = ["LayerReport", "PopulationReport", "estimate_population_statistics"]

logger = logging.getLogger(__name__)


def estimate_population_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int,
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
    over them meanwhile, which is what inference will do. A plain nn.BatchNorm2d that is called
    once per feature level cannot: its forward normalises each call by itself, and only the
    estimate pools its uses. For nn.SyncBatchNorm and subclasses of torch's layers that have a
    forward of their own, the moments of the input are computed once more.

    Estimated are the layers in training mode when this is called (the package's own,
    nn.BatchNorm1d/2d/3d, nn.SyncBatchNorm); those in eval mode are taken as frozen, left alone and
    named in the report, as are statistics that no value reached. So are FrozenBatchNorm2d
    (detectron2's and torchvision's), unless ``thaw`` says otherwise.

    Nothing else changes: other buffers, modes, attributes of modules, momentum and the random
    generators (Python, numpy, torch) come back as they were. After any exception, KeyboardInterrupt
    included, the statistics do too.

    Args:
        model: may be wrapped in DistributedDataParallel, DataParallel or torch.compile; the module
            inside runs.
        batches: inputs of the model on this rank. At most ``num_batches`` are taken.
        num_batches: forwards per rank, the same on all ranks.
        group: ranks that estimate together; None: the default group, or this process alone.
        labelled: True: the model runs in the modes it is in, as in training (within a throwaway
            event storage when detectron2 is in use). False: it runs in eval mode with only the
            estimated layers in training mode, for data without labels. None: True unless the first
            batch on some rank is a list of detectron2's dicts without ground truth.
        autocast: makes the context of each forward, such as ``lambda: torch.autocast("cuda")``;
            None: whatever autocast is active around the call.
        forward: runs ``model`` (unwrapped) on a batch; None: ``model(batch)``.
        seed: of the random numbers that the forwards draw (each rank adds its number) and of
            modules that ask for one (``rethinking_bn.randomness``), so that the same weights and
            batches give the same statistics; None: the generators go on from where they are.
        progress: log a line with the expected time left every ten seconds on rank 0.
        allow_empty: return an empty report, with a log line and without consuming a batch, where
            otherwise a ValueError says that there is no layer to estimate.
        thaw: estimate every FrozenBatchNorm2d, too; they stay of that class. With their weights
            fixed, this adapts a whole detector to the domain of ``batches`` (Table 4).

    Returns:
        What was seen and how far the old statistics were off.

    Raises:
        ValueError: when ``num_batches`` is no positive integer, when no BN-like layer is in
            training mode, when the statistics of a layer to thaw are folded into its weight, when
            ranks disagree about one or the other, or when a loader ends early; on all ranks, naming
            the rank (a short loader: RuntimeError on the other ranks).
        RuntimeError: when a loader raises (chained to what it raised), or another rank failed.
        FloatingPointError: when statistics are not finite, or overflow the type of their buffers;
            on all ranks, naming the layer.
        Exception: whatever the model raises. Other ranks are told, unless the model has layers
            that communicate: they may be waiting inside one, and only the end of this process ends
            their wait.
    """
    model = unwrap(model)
    num_batches, layers, frozen = _agree_on_plan(
        model, num_batches, autocast, labelled, group, thaw
    )
    world = get_world_size(group)
    if not layers:
        why = _why_nothing(model, frozen)
        if not allow_empty:
            raise ValueError(f"population training finds nothing to estimate: {why}")
        logger.info("population training: nothing to estimate, %s", why)
        return PopulationReport((), tuple(frozen), 0, world, bool(labelled), 0.0)

    start = time.perf_counter()
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    own_seed = None if seed is None else seed + get_rank(group)
    with isolated_random_state(own_seed, devices), torch.no_grad():
        state = ModelState(model)
        try:
            run = PopulationRun(
                model,
                [layer.layer for layer in layers],
                num_batches,
                group=group,
                autocast=autocast or nullcontext,
                forward=forward or _call,
                seed=seed,
                progress=progress,
            )
            with ExitStack() as stack:
                for layer in layers:
                    stack.enter_context(layer.observing())
                labelled = run(batches, labelled)
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
        tuple(reports), tuple(frozen), num_batches, world, labelled, time.perf_counter() - start
    )
    _log(report, main=progress and get_rank(group) == 0)
    return report


def _call(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def _why_nothing(model: nn.Module, frozen: list[str]) -> str:
    if frozen:
        return (
            f"all {len(frozen)} BN-like layers are frozen, that is in eval mode (call train() "
            "before, or unfreeze_batch_norm for those that freeze_batch_norm froze)"
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return "no BN-like layer can be seen in a scripted or traced model: estimate before export"
    return "the model has no BN-like layer that keeps statistics"


def _agree_on_plan(
    model: nn.Module,
    num_batches: int,
    autocast: Autocast | None,
    labelled: bool | None,
    group: ProcessGroup | None,
    thaw: bool,
) -> tuple[int, list[ObservedLayer], list[str]]:
    """Check the arguments here and against the other ranks', in one exchange."""
    error: Exception | None = None
    layers: list[ObservedLayer] = []
    frozen: list[str] = []
    try:
        num_batches = _positive(num_batches)
        if hasattr(autocast, "__enter__"):
            raise ValueError(
                "autocast must be a function that makes a context, such as "
                "lambda: torch.autocast('cuda'), not the context itself"
            )
        found, frozen = find_population_layers(model)
        layers = observe(found)
        constant = named_frozen_layers(model)
        if thaw:
            layers += [ThawedLayer(name, layer) for name, layer in constant]
        else:
            frozen += [name for name, _ in constant]
    except Exception as raised:
        error = raised
    message = None if error is None else f"{type(error).__name__}: {error}"
    sets = [(layer.name, layer.domains, layer.old[0].shape[1]) for layer in layers]
    plans = all_gather_object((message, num_batches, labelled, sets), group)
    if error is not None:
        raise error
    for rank, (said, *_) in enumerate(plans):
        if said is not None:
            raise ValueError(f"population training cannot start: rank {rank}: {said}")
    for index, what in ((1, "num_batches"), (2, "labelled"), (3, "layers in training mode")):
        values = [plan[index] for plan in plans]
        if any(value != values[0] for value in values):
            told = "; ".join(f"rank {r}: {_shorten(v)}" for r, v in enumerate(values))
            raise ValueError(f"ranks disagree about {what}: {told}")
    return num_batches, layers, frozen


def _positive(num_batches: Any) -> int:
    try:
        number = operator.index(num_batches)
    except TypeError:
        number = 0
    if number < 1 or isinstance(num_batches, bool):
        raise ValueError(f"num_batches must be a positive integer, got {num_batches!r}")
    return number


def _shorten(value: Any, length: int = 300) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}... ({len(value)} in all)"


def _merge_over_ranks(layers: list[ObservedLayer], group: ProcessGroup | None) -> list[Moments]:
    """Return every layer's moments over all ranks, on the CPU: one collective for all layers."""
    local = [layer.moments.total().to(torch.device("cpu")) for layer in layers]
    packed = torch.cat([value.flatten() for moments in local for value in moments])
    gathered = all_gather(packed.to(collective_device(group)), group).cpu()
    merged, start = [], 0
    for moments in local:
        parts = []
        for value in moments:
            part = gathered[:, start : start + value.numel()]
            parts.append(part.reshape(-1, *value.shape))
            start += value.numel()
        # the same arithmetic on the same numbers: bitwise equal on every rank
        count, mean, m2 = parts
        merged.append(merge_moments(count, mean, m2))
    return merged


def _write(layers: list[ObservedLayer], moments: list[Moments]) -> None:
    for layer, pooled in zip(layers, moments, strict=True):
        for domain, mean, m2 in zip(layer.domains, pooled.mean, pooled.m2, strict=True):
            bad = int((~(mean.isfinite() & m2.isfinite())).sum())
            if bad:
                raise FloatingPointError(
                    f"{_label(layer, domain)}: {bad} of {len(mean)} channels saw a value that is "
                    "not finite; the old statistics are kept"
                )
        layer.write(pooled)
        for domain, count, mean, var in zip(
            layer.domains, pooled.count, *layer.read(), strict=True
        ):
            if count > 0 and not (mean.isfinite().all() and var.isfinite().all()):
                raise FloatingPointError(
                    f"{_label(layer, domain)}: the statistics overflow the type of the buffers; "
                    "the old ones are kept"
                )


def _label(layer: ObservedLayer, domain: str) -> str:
    return f"{layer.name}[{domain}]" if domain else layer.name


def _compare(layer: ObservedLayer, moments: Moments) -> Iterator[LayerReport]:
    new = layer.read()
    for row, domain in enumerate(layer.domains):
        yield compare(
            layer.name,
            domain,
            round(moments.count[row].item()),
            (layer.old[0][row], layer.old[1][row]),
            (new[0][row], new[1][row]),
            eps=layer.layer.eps,
            mean_square=hasattr(layer.layer, "running_mean_square"),
        )


def _log(report: PopulationReport, main: bool) -> None:
    if main:
        logger.info(report.summary())
    if main and report.frozen:
        logger.info("frozen BN-like layers, left alone: %s", ", ".join(report.frozen))
    if main and report.unreached:
        logger.warning("statistics kept, no value seen: %s", ", ".join(report.unreached))
