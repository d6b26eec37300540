"""Freezing every BN-like layer of a model, whoever's it is."""

from __future__ import annotations

import logging

from torch import nn

from rethinking_bn.layers.frozen import freeze_layer, is_frozen, thaw_layer
from rethinking_bn.layers.population_layer import PopulationLayer
from rethinking_bn.population.observers import named_population_layers

logger = logging.getLogger(__name__)


def freeze_batch_norm(model: nn.Module, *, affine: bool = False) -> list[str]:
    """Let every BN-like layer normalise by its population statistics, which stay as they are.

    Unlike ``eval()``, it holds through ``train()`` (with which detectron2's evaluation ends),
    through population training, which names the layers as frozen, and for copies, pickles,
    traced and scripted modules. It is no part of the state dict: a new model that loads one is
    not frozen. In place; nothing but the layers' classes changes, to subclasses of what they were.

    A BatchStatNorm2d normalises by the mini-batch as it does at inference.

    Args:
        model: frozen are the package's layers, nn.BatchNorm1d/2d/3d, nn.SyncBatchNorm and
            subclasses, as far as they keep statistics, whatever mode they are in.
        affine: freeze their weight and bias, too (``requires_grad`` False).

    Returns:
        the names of the layers, those frozen before included.

    Raises:
        ValueError: for a lazy layer that has no size yet; nothing is frozen then.
        RuntimeError: for a CycleBatchNorm2d in mid-cycle, likewise.
    """
    layers = named_population_layers(model)
    for name, layer in layers:
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
            raise ValueError(f"{name}: a lazy layer; run one forward first, so that it has a size")
        if isinstance(layer, PopulationLayer):
            layer.check_can_change_mode("freeze()")
    for _, layer in layers:
        freeze_layer(layer, affine=affine)
    if not layers:
        logger.warning("freeze_batch_norm: no BN-like layer of the model keeps statistics")
    return [name for name, _ in layers]


def unfreeze_batch_norm(model: nn.Module) -> list[str]:
    """Undo :func:`freeze_batch_norm`.

    The layers are in the mode that was last asked of them (by ``model.train()``, say), and their
    affines need a gradient where they did before.

    Returns:
        the names of the layers that were frozen.
    """
    frozen = [(name, layer) for name, layer in model.named_modules() if is_frozen(layer)]
    for _, layer in frozen:
        thaw_layer(layer)
    return [name for name, _ in frozen]
