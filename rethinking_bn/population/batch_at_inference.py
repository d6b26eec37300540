"""Inference by the statistics of the mini-batch, for any model that has BN-like layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rethinking_bn.layers.bn_like import BatchNormLike, find_bn_like
from rethinking_bn.numerics.normalize import normalize
from rethinking_bn.population.model_state import ModelState, changed

logger = logging.getLogger(__name__)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Let the BN-like layers of a model in eval mode normalise by the batch they are given.

    Mini-batch statistics at inference (arXiv 2105.07576, section 4, Table 3 and Figure 5) agree
    with training where population statistics do not. The batch is that of this rank alone. Layers
    pool otherwise what they pool in training (a multi-domain layer with shared train statistics its
    levels; a head that knows its images, one image at a time; MABN takes the mean square of its
    input). A layer with a forward of its own runs it as in training (a SyncBatchNorm of another
    project: as without statistics). No statistics change, an empty input gives an empty result, a
    single value per channel gives the bias::

        with batch_statistics(model.eval()) as frozen:
            outputs = model(images)

    Args:
        model: its layers are found by :func:`rethinking_bn.layers.bn_like.find_bn_like`. Left
            alone are layers frozen by ``freeze_batch_norm`` (unless ``track_running_stats`` is off:
            such a layer trains by mini-batches alone), those of constant statistics
            (FrozenBatchNorm2d of any project), and those that are not known to be BatchNorm.

    Yields:
        the names of the layers that are left alone.

    Raises:
        ValueError: if a layer is in training mode, or of a kind that cannot do this, by name;
            nothing has changed then.
    """
    layers, unknown = find_bn_like(model)
    keeping = [layer for layer in layers if _keeps_to_population(layer)]
    active = [layer for layer in layers if layer not in keeping and layer.keeps_statistics]
    for layer in active:
        if layer.module.training:
            raise ValueError(f"{layer.name} is in training mode: call model.eval() first")
        if layer.kind == "ours" and not hasattr(layer.module, "batch_stats_at_inference"):
            what = f"{layer.name}: {type(layer.module).__name__}"
            raise ValueError(f"{what} cannot normalise by the mini-batch at inference")
    if unknown:
        logger.warning("batch_statistics leaves alone %s", "; ".join(map(str, unknown)))
    with ExitStack() as stack:
        for layer in active:
            values: dict[str, Any] = {"batch_stats_at_inference": True}
            if layer.kind != "ours":
                values = {"forward": _forward_by_batch(layer)}
            stack.enter_context(changed(vars(layer.module), values))
        yield (*(layer.name for layer in keeping), *(module.name for module in unknown))


def _keeps_to_population(layer: BatchNormLike) -> bool:
    tracks = getattr(layer.module, "track_running_stats", True)
    return layer.frozen == "constant" or (layer.frozen == "freeze_batch_norm" and bool(tracks))


def _forward_by_batch(layer: BatchNormLike) -> Callable[..., Any]:
    if layer.kind == "torch":
        return partial(_normalize, layer.module)
    run = _without_buffers if layer.pools_ranks else _as_in_training
    return partial(run, layer.module, layer.module.forward)


def _normalize(layer: _BatchNorm, input: Tensor) -> Tensor:
    """Be the forward of a torch layer: torch's own refuses empty inputs and single values."""
    weight, bias = (None if value is None else [value] for value in (layer.weight, layer.bias))
    return normalize([input], weight, bias, parts=[0], pools=[0], eps=layer.eps)[0][0]


def _as_in_training(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    state = ModelState(layer)
    try:
        layer.training = True
        return forward(*args, **kw)
    finally:
        state.restore()


def _without_buffers(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    # by torch's rule such a forward takes its batch where it has no statistics
    with changed(layer._buffers, {"running_mean": None, "running_var": None}):
        return forward(*args, **kw)
