"""SOLVER.TRAIN_ONLY in a training with evaluation and population training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rethinking_bn.engine import Trainer
from tests.engine.tiny import register_data, tiny_config, write_data


def test_everything_else_is_bit_equal(tmp_path: Path) -> None:
    write_data(tmp_path)
    cfg = tiny_config(
        register_data(tmp_path),
        tmp_path / "out",
        SOLVER__TRAIN_ONLY="('head.cls_subnet.1', 'head.*_score')",
        MODEL__META_ARCHITECTURE="ConfigurableHeadRetinaNet",
        MODEL__RETINANET__HEAD_NAME="SharedBNRetinaNetHead",
        TEST__PRECISE_BN__ENABLED="True",
    )
    trainer = Trainer(cfg)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    named = ("head.cls_subnet.1.", "head.cls_score.")
    assert changed == {name for name in before if name.startswith(named)}


def test_a_pattern_without_a_module(tmp_path: Path) -> None:
    write_data(tmp_path)
    cfg = tiny_config(
        register_data(tmp_path), tmp_path / "out", SOLVER__TRAIN_ONLY="('head.cls_scores',)"
    )
    with pytest.raises(ValueError, match=r"'head.cls_scores'; there are head.cls_score"):
        Trainer(cfg)
