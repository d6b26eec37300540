"""Freezing the BN-like layers of a model, or everything but a named part of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from rethinking_bn.layers.bn_like import BatchNormLike, find_bn_like
from rethinking_bn.layers.frozen import freeze_layer, is_frozen, thaw_layer
from rethinking_bn.layers.population_layer import PopulationLayer

logger = logging.getLogger(__name__)


def freeze_batch_norm(model: nn.Module, *, affine: bool = False) -> list[str]:
    """Let every BN-like layer normalise by its population statistics, which stay as they are.

    Unlike ``eval()``, it holds through ``train()`` (with which detectron2's evaluation ends), and
    for copies, pickles, traced and scripted modules. It is no part of the state dict: a new model
    that loads one is not frozen. In place; only the layers' classes change, to subclasses.

    A BatchStatNorm2d normalises by the mini-batch as it does at inference.

    Args:
        model: frozen are the BN-like layers that keep statistics
            (:func:`rethinking_bn.layers.bn_like.find_bn_like`), whatever mode they are in. Those of
            constant statistics (FrozenBatchNorm2d of any project) need it not. What is not known to
            be BatchNorm is left alone, and a warning names it.
        affine: freeze their weight and bias, too (``requires_grad`` False).

    Returns:
        the names of the layers, those frozen before included.

    Raises:
        ValueError: for a lazy layer that has no size yet; nothing is frozen then.
        RuntimeError: for a CycleBatchNorm2d in mid-cycle, likewise.
    """
    found = find_bn_like(model)
    layers = _can_freeze(found.layers, "freeze()")
    for layer in layers:
        freeze_layer(layer.module, affine=affine)
    if found.left:
        logger.warning("freeze_batch_norm leaves alone %s", "; ".join(map(str, found.left)))
    elif not found.layers:
        logger.warning("freeze_batch_norm: the model has no BN-like layer that keeps statistics")
    return [layer.name for layer in layers]


def _can_freeze(layers: Sequence[BatchNormLike], where: str) -> list[BatchNormLike]:
    """Return those that keep statistics which may move; raise where one is in mid-cycle."""
    moving = [layer for layer in layers if layer.keeps_statistics and layer.kind != "constant"]
    for layer in moving:
        if isinstance(layer.module, PopulationLayer):
            layer.module.check_can_change_mode(where)
    return moving


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


def train_only(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Leave a gradient to the named modules alone, and freeze the statistics of all other norms.

    What FixRes needs (Touvron et al., "Fixing the train-test resolution discrepancy", arXiv
    1906.06423: the classifier and the last norm layers, at the resolution of inference), and any
    other fine-tuning of a part. In place, before the optimizer is built. A module that a pattern
    names is trained with all that is in it, as far as it was trainable. All others keep their
    parameters, because they get no gradient, and their population statistics, by which their norms
    normalise from now on whatever ``train()`` says. A parameter shared with a named module is
    trained.

    Args:
        patterns: of module names as in ``model.named_modules()``; ``*``, ``?`` and ``[...]`` as in
            fnmatch, case-sensitive, ``*`` across dots.

    Returns:
        the names of the parameters that are trained.

    Raises:
        ValueError: for a pattern without a module, and when nothing would be trained; nothing has
            changed then.
    """
    modules = dict(model.named_modules())
    trained: set[nn.Module] = set()
    for pattern in patterns:
        named = [module for name, module in modules.items() if name and fnmatchcase(name, pattern)]
        if not named:
            close = get_close_matches(pattern, modules, n=5, cutoff=0.5) or list(modules)[1:6]
            raise ValueError(
                f"train_only: no module's name matches {pattern!r}; there are {', '.join(close)}"
            )
        trained.update(child for module in named for child in module.modules())
    kept = {id(p) for module in trained for p in module.parameters(recurse=False)}
    parameters = list(model.named_parameters())
    names = [name for name, p in parameters if id(p) in kept and p.requires_grad]
    if not names:
        raise ValueError(f"train_only: {', '.join(patterns)} leave no parameter to train")
    found = find_bn_like(model)
    unknown = [str(entry) for entry in found.left if entry.module not in trained]
    if unknown:
        logger.warning("train_only leaves alone %s", "; ".join(unknown))
    others = [layer for layer in found.layers if layer.module not in trained]
    layers = _can_freeze(others, "train_only()")
    for layer in layers:
        freeze_layer(layer.module)
    for _, parameter in parameters:
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    logger.info(
        "Training only %d of %d parameters (%s); %d norm layers stay on population statistics.",
        *(len(names), len(parameters), ", ".join(patterns), len(layers)),
    )
    return names
