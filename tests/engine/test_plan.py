"""The plan of every config: what its norm layers will do, and the mistakes it would make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg

from rethinking_bn import get_config_file
from rethinking_bn.config import list_config_files
from rethinking_bn.engine import load_config
from rethinking_bn.engine.norm_plan import Plan, make_plan
from rethinking_bn.layers import BatchNorm2d

FILES = [name for name in list_config_files() if not Path(name).name.startswith("Base-")]
AT_ODDS = ("row2", "row3", "row5")


def plan(name: str, ranks: int = 8, *opts: str) -> Plan:
    return make_plan(load_config(get_config_file(name), opts), ranks)


def warned(made: Plan, text: str) -> bool:
    return any(text in warning for warning in made.warnings)


@pytest.mark.parametrize("name", FILES)
def test_the_plan_of_every_config(name: str) -> None:
    small = "/" in name  # for the CPU
    ranks = 1 if small else 8
    made = plan(name, ranks)
    lines = str(made).splitlines()
    assert len(lines) == 1 + max(1, len(made.layers)) + len(made.warnings)
    assert all(layer.calls for layer in made.layers), "every layer's calls are known"
    assert warned(made, "row 3's mistake") == any(row in name for row in AT_ODDS)
    head = [x for x in made.layers if x.name.startswith(("head.", "roi_heads.")) and x.nbs]
    if "retinanet_bn_row" in name:
        assert {layer.calls for layer in head} == {5} and len(head) == 8
        assert {layer.nbs for layer in head} == {8 if small else 16}
        assert all("ranks" in layer.pools for layer in head)
        assert warned(made, "one process") == small
        shared = "row1" in name or "row2" in name
        assert all(("levels" in layer.pools) == shared for layer in head)
        separate = any(row in name for row in ("row2", "row4", "row6"))
        assert all(("each of 5" in layer.inference) == separate for layer in head)
    if "mask_rcnn_bn_head_1im" in name:
        assert {layer.nbs for layer in head} == {1} and warned(made, "below 8")
    if "shuffle" in name:
        assert {layer.pools for layer in head} == {"shuffled rows"}
    if "batch_stats" in name:
        assert {layer.inference for layer in head} == {"mini-batch statistics"}
    if not small and "gn" not in name and "mabn" not in name:
        backbone = [layer for layer in made.layers if "bottom_up" in layer.name]
        assert len(backbone) == 53 and all(layer.frozen for layer in backbone)
    assert not warned(made, "decay") and not warned(made, "is empty")


def test_mistakes_are_warned_of() -> None:
    row1 = "retinanet_bn_row1.yaml"
    assert warned(plan(row1, 8, "SOLVER.WEIGHT_DECAY_NORM", "0.0001"), "decay by 0.0001")
    assert warned(plan(row1, 8, "MODEL.WEIGHTS", ""), "frozen and MODEL.WEIGHTS is empty")
    assert warned(plan(row1, 4, "SOLVER.IMS_PER_BATCH", "4"), "batch of 4 image(s), below 8")
    with pytest.raises(ValueError, match="IMS_PER_BATCH 16 cannot be divided among 3"):
        plan(row1, 3)


def test_the_batch_is_scaled_to_the_processes_as_in_training() -> None:
    opts = ("SOLVER.REFERENCE_WORLD_SIZE", "8")
    for ranks in (8, 4):
        made = plan("retinanet_bn_row1.yaml", ranks, *opts)
        assert {layer.nbs for layer in made.layers if layer.name.startswith("head.")} == {2 * ranks}


def test_a_config_of_another_project_lacks_our_keys() -> None:
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.WEIGHTS = "RetinaNet", ""
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    assert len(make_plan(cfg).layers) == 53
    assert "THAW" not in cfg.TEST.PRECISE_BN  # the config is as it was


def test_weights_without_statistics_are_warned_of(tmp_path: Path) -> None:
    layer = BatchNorm2d(64)
    layer.running_mean.fill_(1.0)
    state = {
        f"roi_heads.{head}.norm.{key}": value.clone()
        for head in ("box_head.conv1", "box_head.conv2")
        for key, value in layer.state_dict().items()
    }
    state["roi_heads.box_head.conv2.norm.running_mean"].zero_()
    torch.save({"model": state}, tmp_path / "w.pth")
    made = plan("shapes/mask_rcnn_bn_head.yaml", 1, "MODEL.WEIGHTS", str(tmp_path / "w.pth"))
    (warning,) = (w for w in made.warnings if "no statistics" in w)
    assert "box_head.conv2.norm and 6 more layers" in warning
