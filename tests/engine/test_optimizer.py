"""build_optimizer: detectron2's groups, with our norm layers among the norms (defect 9)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import CycleBatchNormList
from detectron2.solver import build_optimizer as stock_build_optimizer
from torch import nn

from rethinking_bn.engine import build_optimizer
from rethinking_bn.layers import (
    BatchStatNorm2d,
    CycleBatchNorm2d,
    MultiDomainBatchNorm2d,
    SyncBatchNorm2d,
)

DOMAIN = {"train_stats": "shared", "population_stats": "domain_specific"}


def config(**solver: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.SOLVER.WEIGHT_DECAY = 0.5
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.25
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


def model_of(*norms: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), *norms, nn.Conv2d(4, 2, 1), nn.Linear(2, 2))


def decay_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def groups_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        {**group, "params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("affine", ["shared", "domain_specific"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda affine: MultiDomainBatchNorm2d(4, 3, affine=affine, **DOMAIN),
        lambda affine: CycleBatchNorm2d(4, 3),
        lambda affine: SyncBatchNorm2d(4),
        lambda affine: BatchStatNorm2d(4),
        lambda affine: CycleBatchNormList(3, num_features=4),
    ],
)
def test_every_norm_layer_gets_the_norm_weight_decay(layer: Any, affine: str) -> None:
    model = model_of(layer(affine))
    decay = decay_by_name(build_optimizer(config(), model), model)
    assert set(decay) == {name for name, _ in model.named_parameters()}  # none lost, none twice
    for name, value in decay.items():
        assert value == (0.25 if name.startswith("1.") else 0.5), name


@pytest.mark.parametrize(
    "solver",
    [
        {},
        {"WEIGHT_DECAY_BIAS": 0.125},
        {"BIAS_LR_FACTOR": 2.0},
        {"WEIGHT_DECAY_BIAS": 0.125, "BIAS_LR_FACTOR": 2.0, "NESTEROV": True},
    ],
)
def test_groups_are_those_of_the_same_model_with_norms_that_detectron2_knows(
    solver: dict[str, Any],
) -> None:
    ours = model_of(CycleBatchNormList(3, num_features=4), CycleBatchNorm2d(4, 3))
    known = model_of(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in known.named_parameters()]
    cfg = config(**solver)
    assert groups_by_name(build_optimizer(cfg, ours), ours) == groups_by_name(
        stock_build_optimizer(cfg, known), known
    )


@pytest.mark.parametrize("solver", [{}, {"WEIGHT_DECAY_NORM": 0.0}, {"WEIGHT_DECAY_BIAS": 0.0}])
def test_a_stock_model_gets_exactly_detectron2s_groups(solver: dict[str, Any]) -> None:
    model = model_of(nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    cfg = config(**solver)
    assert groups_by_name(build_optimizer(cfg, model), model) == groups_by_name(
        stock_build_optimizer(cfg, model), model
    )


def test_shared_parameters_are_optimized_once_and_frozen_ones_not() -> None:
    norm = CycleBatchNorm2d(4, 3)
    norm.bias.requires_grad_(False)
    model = model_of(norm, norm)
    groups = build_optimizer(config(), model).param_groups
    parameters = [p for group in groups for p in group["params"]]
    assert len(parameters) == len(set(parameters)) == len(list(model.parameters())) - 1
