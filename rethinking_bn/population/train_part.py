"""Training a few modules of a model, everything else bit for bit as it is.

What FixRes needs (Touvron et al., "Fixing the train-test resolution discrepancy", arXiv
1906.06423: the classifier and the last norm layers, at the resolution of inference), and any other
fine-tuning of a part.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from rethinking_bn.layers.frozen import freeze_layer
from rethinking_bn.layers.population_layer import PopulationLayer
from rethinking_bn.population.observers import named_population_layers

logger = logging.getLogger(__name__)


def train_only(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Leave a gradient to the named modules alone, and freeze the statistics of all other norms.

    In place, before the optimizer is built. A module that a pattern names is trained with all that
    is in it, as far as it was trainable. All others keep their parameters, because they get no
    gradient, and their population statistics, by which their norms normalise from now on whatever
    ``train()`` says (see :func:`rethinking_bn.population.freeze_batch_norm`). A parameter shared
    with a named module is trained.

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
    layers = [layer for _, layer in named_population_layers(model) if layer not in trained]
    for layer in layers:
        if isinstance(layer, PopulationLayer):
            layer.check_can_change_mode("train_only()")
    for layer in layers:
        freeze_layer(layer)
    for _, parameter in parameters:
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    logger.info(
        "Training only %d of %d parameters (%s); %d norm layers stay on population statistics.",
        *(len(names), len(parameters), ", ".join(patterns), len(layers)),
    )
    return names
