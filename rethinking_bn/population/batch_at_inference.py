"""Inference by the statistics of the mini-batch, for any model that has BN-like layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rethinking_bn.layers.frozen import is_frozen
from rethinking_bn.numerics.normalize import normalize
from rethinking_bn.population.observers import named_frozen_layers, named_population_layers


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Let the BN-like layers of a model in eval mode normalise by the batch they are given.

    Mini-batch statistics at inference (arXiv 2105.07576, section 4, Table 3 and Figure 5) agree
    with training where population statistics do not. It is always the batch of this rank alone:
    ranks evaluate different numbers of images. Layers pool what they pool in training otherwise
    (a multi-domain layer with shared train statistics its levels; a head that knows its images,
    one image at a time; MABN takes the mean square of its input). No statistics change, an
    empty input gives an empty result, a single value per channel gives the bias::

        with batch_statistics(model.eval()) as frozen:
            outputs = model(images)

    Args:
        model: its layers, of torch, of subclasses and of this package, are found as by
            :func:`rethinking_bn.population.estimate_population_statistics`. Left alone are layers
            frozen by ``freeze_batch_norm`` or FrozenBatchNorm2d (detectron2's, torchvision's).

    Yields:
        the names of the frozen layers.

    Raises:
        ValueError: if a layer is in training mode, or of a kind that cannot do this, by name;
            nothing has changed then.
    """
    layers = [(name, layer) for name, layer in named_population_layers(model)]
    active = [(name, layer) for name, layer in layers if not is_frozen(layer)]
    for name, layer in active:
        if layer.training:
            raise ValueError(f"{name} is in training mode: call model.eval() first")
        if not (isinstance(layer, _BatchNorm) or hasattr(layer, "batch_stats_at_inference")):
            kind = type(layer).__name__
            raise ValueError(f"{name}: {kind} cannot normalise by the mini-batch at inference")
    frozen = [name for name, layer in layers if is_frozen(layer)]
    frozen += [name for name, _ in named_frozen_layers(model)]
    with ExitStack() as stack:
        for _, layer in active:
            change: tuple[dict[str, Any], dict[str, Any]]
            if hasattr(layer, "batch_stats_at_inference"):
                change = vars(layer), {"batch_stats_at_inference": True}
            elif type(layer).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
                assert isinstance(layer, _BatchNorm)  # for the type checker
                change = vars(layer), {"forward": partial(_normalize, layer)}
            else:  # by torch's rule such a forward takes its batch where it has no statistics
                change = layer._buffers, {"running_mean": None, "running_var": None}
            stack.enter_context(_changed(*change))
        yield tuple(frozen)


@contextmanager
def _changed(dictionary: dict[str, Any], values: dict[str, Any]) -> Iterator[None]:
    """Change entries of a dictionary for a while."""
    before = {key: dictionary[key] for key in values if key in dictionary}
    dictionary.update(values)
    try:
        yield
    finally:
        dictionary.update(before)
        for key in values.keys() - before.keys():
            del dictionary[key]


def _normalize(layer: _BatchNorm, input: Tensor) -> Tensor:
    """Be the forward of a torch layer: torch's own refuses empty inputs and single values."""
    outputs, _ = normalize(
        [input],
        None if layer.weight is None else [layer.weight],
        None if layer.bias is None else [layer.bias],
        parts=[0],
        pools=[0],
        eps=layer.eps,
    )
    return outputs[0]
