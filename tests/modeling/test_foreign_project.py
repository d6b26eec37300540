"""A project of somebody else's: detectron2's DefaultTrainer and one import of ours."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer

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
TEST:
  EVAL_PERIOD: 0
  PRECISE_BN:
    ENABLED: True
    NUM_ITER: 1
"""


def test_default_trainer_trains_a_head_named_in_yaml(tmp_path: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "foreign.yaml").write_text(YAML)
    base = tiny_config(register_data(tmp_path), tmp_path / "output", DATASETS__TEST=())
    cfg = get_cfg()
    rethinking_bn.add_rethinking_bn_config(cfg)
    cfg.merge_from_other_cfg(base)
    cfg.merge_from_file(str(tmp_path / "foreign.yaml"))
    Path(cfg.OUTPUT_DIR).mkdir()
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    saved = torch.load(tmp_path / "output" / "model_final.pth")["model"]
    means = [saved[f"head.cls_subnet.1.{level}.running_mean"] for level in range(5)]
    assert all(mean.abs().sum() > 0 for mean in means)
    assert not torch.equal(means[0], means[4])
