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
    that loads one is not frozen. In place; only the layers' classes change, to subclasses. A
    BatchStatNorm2d normalises by the mini-batch as it does at inference.

    Args:
        model: its layers that :func:`rethinking_bn.layers.bn_like.find_bn_like` finds, in whatever
            mode, are frozen where their statistics may move. What is not known to be BatchNorm is
            left alone, and a warning names it.
        affine: freeze their weight and bias, too (``requires_grad`` False).

    Returns:
        the names of the layers, those frozen before included.

    Raises:
        ValueError: for a lazy layer that has no size yet; nothing is frozen then.
        RuntimeError: for a CycleBatchNorm2d in mid-cycle, likewise.
    """
    found = find_bn_like(model)
    frozen = _freeze(found.layers, "freeze()", affine)
    if found.left:
        logger.warning("freeze_batch_norm leaves alone %s", "; ".join(map(str, found.left)))
    elif not found.layers:
        logger.warning("freeze_batch_norm: the model has no BN-like layer that keeps statistics")
    return frozen


def _freeze(layers: Sequence[BatchNormLike], where: str, affine: bool = False) -> list[str]:
    """Freeze the layers whose statistics may move, but none where one is in mid-cycle."""
    moving = [layer for layer in layers if layer.keeps_statistics and layer.kind != "constant"]
    for layer in moving:
        if isinstance(layer.module, PopulationLayer):
            layer.module.check_can_change_mode(where)
    for layer in moving:
        freeze_layer(layer.module, affine=affine)
    return [layer.name for layer in moving]


def unfreeze_batch_norm(model: nn.Module) -> list[str]:
    """Undo :func:`freeze_batch_norm`, and return the names of the layers that were frozen.

    They are in the mode that was last asked of them (by ``model.train()``, say), and their affines
    need a gradient where they did before.
    """
    frozen = [(name, layer) for name, layer in model.named_modules() if is_frozen(layer)]
    for _, layer in frozen:
        thaw_layer(layer)
    return [name for name, _ in frozen]


def train_only(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Leave a gradient to the named modules alone, and freeze the statistics of all other norms.

    What FixRes needs (Touvron et al., "Fixing the train-test resolution discrepancy", arXiv
    1906.06423: the classifier and the last norm layers, at the resolution of inference), and any
    other fine-tuning of a part. In place, before the optimizer is built. A named module is trained
    with all that is in it, as far as it was trainable, parameters that it shares included. The
    others keep their parameters, which get no gradient, and their population statistics, by which
    their norms normalise from now on whatever ``train()`` says.

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
    frozen = _freeze(others, "train_only()")
    for _, parameter in parameters:
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    logger.info(
        "Training only %d of %d parameters (%s); %d norm layers stay on population statistics.",
        *(len(names), len(parameters), ", ".join(patterns), len(frozen)),
    )
    return names
