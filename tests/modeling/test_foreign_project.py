"""A project of somebody else's: detectron2's DefaultTrainer, one import of ours, a YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer
from torch import Tensor

import rethinking_bn
from tests.engine.tiny import register_data, tiny_config, write_data

YAML = """
MODEL:
  META_ARCHITECTURE: "ConfigurableHeadRetinaNet"
  RETINANET:
    HEAD_NAME: "DomainBNRetinaNetHead"
    NORM: "SyncBN"
SOLVER:
  MAX_ITER: 2
  WEIGHT_DECAY_NORM: 0.25
TEST:
  EVAL_PERIOD: 0
  PRECISE_BN:
    ENABLED: True
    NUM_ITER: 1
"""


def foreign_config(folder: Path) -> CfgNode:
    """Return the config of a project whose data, sizes and schedule are its own."""
    write_data(folder)
    (folder / "foreign.yaml").write_text(YAML)
    base = tiny_config(register_data(folder), folder / "output", DATASETS__TEST=())
    cfg = get_cfg()
    rethinking_bn.add_rethinking_bn_config(cfg)
    cfg.merge_from_other_cfg(base)
    cfg.merge_from_file(str(folder / "foreign.yaml"))
    Path(cfg.OUTPUT_DIR).mkdir()
    return cfg


def train(trainer: DefaultTrainer) -> list[Tensor]:
    """Train and return the saved population means of a norm layer, per level."""
    trainer.resume_or_load(resume=False)
    trainer.train()
    saved = torch.load(Path(trainer.cfg.OUTPUT_DIR) / "model_final.pth")["model"]
    return [saved[f"head.cls_subnet.1.{level}.running_mean"] for level in range(5)]


class ForeignTrainer(DefaultTrainer):
    """What README asks of a trainer: our optimizer, and our hook in place of detectron2's."""

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        return rethinking_bn.engine.build_optimizer(cfg, model)

    def build_hooks(self) -> list[Any]:
        return rethinking_bn.engine.with_rethinking_bn(super().build_hooks(), self.cfg, self.model)


def test_two_overrides_add_population_training_and_norm_weight_decay(tmp_path: Path) -> None:
    trainer = ForeignTrainer(foreign_config(tmp_path))
    decays = {
        parameter: group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    norm = trainer.model.head.cls_subnet[1]
    assert {decays[parameter] for parameter in norm.parameters()} == {0.25}
    assert decays[trainer.model.head.cls_score.weight] == trainer.cfg.SOLVER.WEIGHT_DECAY
    # EMA weighs the first batch by 0.1 and its start at 0 by 0.8: far from the population
    steps: list[Tensor] = []
    norm.register_forward_hook(lambda *_: steps.append(norm.get_buffer("0.running_mean").clone()))
    means = train(trainer)
    ema = steps[1]
    assert means[0].norm() > 2 * ema.norm()
