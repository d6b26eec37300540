"""detectron2's optimizer, with the norm weight decay for norm layers it does not know."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import CycleBatchNormList
from detectron2.solver import build_optimizer as detectron2_build_optimizer
from torch import nn

from rethinking_bn.engine.unread_keys import warn_of_unread_keys
from rethinking_bn.layers import PopulationLayer

# detectron2 recognises norm layers by a closed list of torch's classes. Its own CycleBatchNormList
# is not on it, and neither are these layers of ours that subclass none of torch's.
_NORM_LAYERS = (PopulationLayer, CycleBatchNormList)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build detectron2's optimizer; every norm layer gets ``SOLVER.WEIGHT_DECAY_NORM``.

    Learning rates, the settings for biases and gradient clipping are detectron2's. A model whose
    norm layers detectron2 knows gets exactly detectron2's parameter groups; any other model gets
    the groups detectron2 would have built had it known the layers.

    Keys of ours in ``cfg`` that the model has not read are warned of.

    For a project with its own trainer::

        class MyTrainer(DefaultTrainer):
            @classmethod
            def build_optimizer(cls, cfg, model):
                return rethinking_bn.engine.build_optimizer(cfg, model)
    """
    warn_of_unread_keys(cfg)
    return decay_norms(cfg, detectron2_build_optimizer(cfg, model), model)


def decay_norms(
    cfg: CfgNode, optimizer: torch.optim.Optimizer, model: nn.Module
) -> torch.optim.Optimizer:
    """Give SOLVER.WEIGHT_DECAY_NORM to the norms that a fresh optimizer's builder did not know."""
    weight_decay = cfg.SOLVER.WEIGHT_DECAY_NORM
    if weight_decay is None:
        return optimizer
    # as in detectron2, a setting for all biases goes before the one for norms
    bias_is_set = cfg.SOLVER.WEIGHT_DECAY_BIAS is not None
    unknown_norms = {
        parameter
        for layer in model.modules()
        if isinstance(layer, _NORM_LAYERS)
        for name, parameter in layer.named_parameters()
        if not (bias_is_set and name.rpartition(".")[2] == "bias")
    }
    _set_weight_decay(optimizer, model, unknown_norms, weight_decay)
    return optimizer


def _set_weight_decay(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    parameters: set[nn.Parameter],
    weight_decay: float,
) -> None:
    """Regroup a fresh optimizer's parameters, in the model's order, with another weight decay."""
    settings: dict[nn.Parameter, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        shared = {key: value for key, value in group.items() if key != "params"}
        settings.update({parameter: dict(shared) for parameter in group["params"]})
    changed = [
        parameter
        for parameter in parameters & settings.keys()
        if settings[parameter]["weight_decay"] != weight_decay
    ]
    if not changed:
        return
    for parameter in changed:
        settings[parameter]["weight_decay"] = weight_decay
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for parameter in model.parameters():
        if parameter in settings:
            shared = settings[parameter]
            group = groups.setdefault(tuple(shared.items()), {"params": [], **shared})
            group["params"].append(parameter)
    optimizer.param_groups[:] = groups.values()
