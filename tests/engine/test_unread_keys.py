"""Keys of ours that the chosen model does not read are refused, or warned of (defect 19)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, SimpleTrainer
from detectron2.modeling import META_ARCH_REGISTRY, ROI_BOX_HEAD_REGISTRY
from detectron2.modeling.meta_arch import RetinaNet
from torch import nn

from rethinking_bn import get_config_file
from rethinking_bn.engine import (
    PreciseBN,
    Trainer,
    build_optimizer,
    load_config,
    with_rethinking_bn,
)
from rethinking_bn.engine.unread_keys import unread_keys
from tests.engine.tiny import register_data, tiny_config

ROW_1 = {"MODEL__RETINANET__HEAD_NAME": "SharedBNRetinaNetHead"}


class ForeignRetinaNet(RetinaNet):
    """Reads the config in its own way."""

    @classmethod
    def from_config(cls, cfg: Any) -> Any:
        return super().from_config(cfg)


class InheritingRetinaNet(RetinaNet):
    """Reads what detectron2's reads."""


class TheirHead(nn.Module):
    """Reads MODEL.GN, as any project may."""

    def __init__(self, cfg: Any, input_shape: Any) -> None:
        super().__init__()


if "TheirHead" not in ROI_BOX_HEAD_REGISTRY:
    ROI_BOX_HEAD_REGISTRY.register(TheirHead)
for architecture in (ForeignRetinaNet, InheritingRetinaNet):
    if architecture.__name__ not in META_ARCH_REGISTRY:
        META_ARCH_REGISTRY.register(architecture)


@pytest.mark.parametrize(
    ("architecture", "read"),
    [
        ("RetinaNet", False),
        ("InheritingRetinaNet", False),
        ("GeneralizedRCNN", False),
        ("ForeignRetinaNet", True),
        ("ConfigurableHeadRetinaNet", True),
    ],
)
def test_who_reads_the_head(tmp_path: Path, architecture: str, read: bool) -> None:
    cfg = tiny_config("any", tmp_path, MODEL__META_ARCHITECTURE=architecture, **ROW_1)
    assert (unread_keys(cfg) == []) == read


@pytest.mark.parametrize(
    ("key", "value", "read_with"),
    [
        ("DISTILL.TEACHER_CONFIG", "a.yaml", {"META_ARCHITECTURE": "DistilledRetinaNet"}),
        ("DISTILL.WEIGHT", 0.5, {"META_ARCHITECTURE": "ForeignRetinaNet"}),
        ("DOMAIN_BN.AFFINE", "shared", {"DOMAIN_BN.DATASETS": [["a"]]}),
        ("DOMAIN_BN.DATASETS", [["a"], ["b"]], {"META_ARCHITECTURE": "ConfigurableHeadRetinaNet"}),
        ("GN.NUM_GROUPS", 8, {"BACKBONE.NAME": "build_gn_retinanet_resnet_fpn_backbone"}),
        (
            "GN.NUM_GROUPS",
            8,
            {"RETINANET.HEAD_NAME": "MultiDomainBNRetinaNetHead", "RETINANET.NORM": "GN"},
        ),
        ("GN.NUM_GROUPS", 8, {"META_ARCHITECTURE": "ForeignRetinaNet"}),
    ],
)
def test_keys_of_parts_that_are_not_there(
    tmp_path: Path, key: str, value: Any, read_with: dict[str, Any]
) -> None:
    """Defect 19, for the keys that came later."""
    cfg = tiny_config("any", tmp_path)
    architecture = "RetinaNet" if key == "DOMAIN_BN.DATASETS" else "ConfigurableHeadRetinaNet"
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", architecture, f"MODEL.{key}", value])
    (line,) = unread_keys(cfg)
    assert line.startswith(f"MODEL.{key} is ") and "\n" not in line
    cfg.merge_from_list([item for name, v in read_with.items() for item in (f"MODEL.{name}", v)])
    assert unread_keys(cfg) == []


def test_heads_of_other_projects_may_read_the_groups() -> None:
    name = get_config_file("mask_rcnn_no_norm.yaml")
    groups = ["MODEL.GN.NUM_GROUPS", "16"]
    assert unread_keys(load_config(name, groups))
    assert not unread_keys(load_config(name, [*groups, "MODEL.ROI_BOX_HEAD.NAME", "TheirHead"]))


def test_our_trainer_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="HEAD_NAME is 'SharedBN.*RetinaNet does not read it") as e:
        Trainer(tiny_config("any", tmp_path, **ROW_1))
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_parts_of_ours_in_a_foreign_trainer_warn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = tiny_config(register_data(tmp_path), tmp_path / "out", **ROW_1)
    model = DefaultTrainer.build_model(cfg)
    optimizer = build_optimizer(cfg, model)

    def warned() -> int:
        found = [r for r in caplog.records if "does not read it" in r.getMessage()]
        caplog.clear()
        assert all(r.levelname == "WARNING" and "HEAD_NAME" in r.getMessage() for r in found)
        return len(found)

    assert warned() == 1
    with_rethinking_bn([], cfg, model)
    assert warned() == 1
    trainer = SimpleTrainer(model, [], optimizer)
    trainer.cfg = cfg
    trainer.register_hooks([PreciseBN(0, model, [], 1)])
    trainer.before_train()
    assert warned() == 1


@pytest.mark.parametrize(
    "overrides",
    [
        {"META_ARCHITECTURE": "ConfigurableHeadRetinaNet"},
        {
            "ROI_HEADS.NAME": "StandardROIHeads",
            "ROI_BOX_HEAD.NAME": "NormBoxHead",
            "BACKBONE.NAME": "build_resnet_fpn_backbone",
            "ROI_HEADS.IN_FEATURES": "['p2']",
        },
        {"ROI_HEADS.NAME": "NormImagesROIHeads"},
        {"BACKBONE.NAME": "build_mabn_resnet_backbone"},
    ],
    ids=lambda value: next(iter(value.values())),
)
def test_a_config_without_our_keys_says_what_to_call(overrides: dict[str, str]) -> None:
    """Defect 31: it was an AttributeError about a missing key."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    for key, value in overrides.items():
        cfg.merge_from_list([f"MODEL.{key}", value])
    if "ROI_HEADS.IN_FEATURES" in overrides:
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2"]
        cfg.MODEL.RPN.IN_FEATURES = ["p2"]
    with pytest.raises(ValueError, match="call rethinking_bn.add_rethinking_bn_config") as caught:
        DefaultTrainer.build_model(cfg)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="call rethinking_bn.add_rethinking_bn_config"):
        with_rethinking_bn([], cfg, nn.Linear(1, 1))
