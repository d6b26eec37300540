"""Training with MABN throughout: what it needs, and what its checkpoints hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode

from rethinking_bn.engine import Trainer
from rethinking_bn.layers import MABN2d
from tests.engine.tiny import register_data, tiny_config, write_data


@pytest.fixture
def cfg(tmp_path: Path) -> CfgNode:
    write_data(tmp_path)
    return tiny_config(
        register_data(tmp_path),
        tmp_path / "out",
        MODEL__META_ARCHITECTURE="ConfigurableHeadRetinaNet",
        MODEL__BACKBONE__NAME="build_mabn_retinanet_resnet_fpn_backbone",
        MODEL__RETINANET__HEAD_NAME="MultiDomainBNRetinaNetHead",
        MODEL__RETINANET__NORM="MABN",
        SOLVER__IMS_PER_BATCH=2,
        SOLVER__MAX_ITER=3,
        TEST__EVAL_PERIOD=3,
    )


def test_trains_re_estimates_and_saves(cfg: CfgNode, tmp_path: Path) -> None:
    cfg.TEST.PRECISE_BN.ENABLED = False
    moving = Trainer(cfg)
    moving.train()
    cfg.TEST.PRECISE_BN.ENABLED = True
    trainer = Trainer(cfg)
    trainer.train()
    layers = {name: m for name, m in trainer.model.named_modules() if isinstance(m, MABN2d)}
    assert len(layers) == 53 + 6 + 2
    saved = torch.load(tmp_path / "out" / "model_final.pth", weights_only=False)["model"]
    for name, layer in layers.items():
        other = moving.model.get_submodule(name)
        assert layer.iterations == other.iterations == 3
        assert torch.equal(layer.weight, other.weight)
        assert not torch.equal(layer.running_mean_square, other.running_mean_square)
        assert torch.equal(saved[f"{name}.running_mean_square"], layer.running_mean_square)


def test_fine_tuning_without_weights_is_refused(cfg: CfgNode, tmp_path: Path) -> None:
    cfg.MODEL.MABN.REQUIRE_WEIGHTS = True
    trainer = Trainer(cfg)
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty, .* trained with MABN"):
        trainer.resume_or_load(resume=True)
    torch.save({"model": trainer.model.state_dict()}, tmp_path / "mabn.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "mabn.pth")
    Trainer(cfg).resume_or_load(resume=True)
