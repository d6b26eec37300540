"""DistilledRetinaNet: the soft loss against its formula, and a teacher that is no part of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from rethinking_bn.engine import build_optimizer
from rethinking_bn.engine.checks import check_teacher
from rethinking_bn.modeling import DistilledRetinaNet
from rethinking_bn.modeling.distilled import Teacher, teacher_config
from rethinking_bn.population import estimate_population_statistics
from tests.modeling.models import retinanet_config, training_batch

T, WEIGHT = 4.0, 3.0


def student_config(folder: Path, **teacher: Any) -> CfgNode:
    """Return a student's config, with the files of a teacher whose BatchNorm statistics moved."""
    cfg = retinanet_config(MODEL__RETINANET__NORM="BN", **teacher)
    torch.manual_seed(1)
    model = build_model(cfg)
    with EventStorage(), torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.05 * torch.randn_like(tensor)
        model(training_batch())
    (folder / "teacher.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, folder / "teacher.pth")
    return retinanet_config(
        MODEL__META_ARCHITECTURE="DistilledRetinaNet",
        MODEL__RETINANET__NORM="BN",
        MODEL__DISTILL__TEACHER_CONFIG=str(folder / "teacher.yaml"),
        MODEL__DISTILL__TEACHER_WEIGHTS=str(folder / "teacher.pth"),
        MODEL__DISTILL__TEMPERATURE=T,
        MODEL__DISTILL__WEIGHT=WEIGHT,
    )


def losses(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    with EventStorage():
        return model(batch)


def logits(model: Any, batch: Any) -> torch.Tensor:
    """Return (N, anchors, K)."""
    features = model.backbone(model.preprocess_image(batch).tensor)
    levels = model.head([features[name] for name in model.head_in_features])[0]
    return torch.cat(model._transpose_dense_predictions([levels], [model.num_classes])[0], dim=1)


def test_the_loss_and_its_gradient(tmp_path: Path) -> None:
    cfg = student_config(tmp_path)
    torch.manual_seed(0)
    model = build_model(cfg)
    assert isinstance(model, DistilledRetinaNet)
    plain_cfg = cfg.clone()
    plain_cfg.MODEL.META_ARCHITECTURE = "ConfigurableHeadRetinaNet"
    torch.manual_seed(0)
    plain = build_model(plain_cfg)
    batch = training_batch()
    found, without = losses(model, batch), losses(plain, batch)
    assert set(found) == {*without, "loss_distill"}
    assert all(torch.equal(found[name], loss) for name, loss in without.items())

    teacher = build_model(teacher_config(cfg.MODEL.DISTILL.TEACHER_CONFIG))
    teacher.load_state_dict(torch.load(tmp_path / "teacher.pth")["model"])
    targets = logits(teacher.eval(), batch).double().detach()
    student = logits(plain, batch)  # the running statistics have no part in it
    with torch.no_grad():
        anchors = plain.anchor_generator([torch.zeros(1, 1, s, s) for s in (8, 4, 2, 1, 1)])
        labels, _ = plain.label_anchors(anchors, [item["instances"] for item in batch])
    counts = torch.stack(labels) >= 0
    assert 0 < counts.sum() < counts.numel()  # some anchors are ignored
    p, q = (targets / T).sigmoid()[counts], (student.double() / T).sigmoid()[counts]
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    expected = WEIGHT * T * T * each.mean()
    torch.testing.assert_close(found["loss_distill"].double(), expected, rtol=1e-4, atol=0)
    found["loss_distill"].backward()
    expected.backward()
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_teacher_is_no_part_of_the_model(tmp_path: Path) -> None:
    cfg = student_config(tmp_path)
    model = build_model(cfg)
    names = list(model.state_dict())
    state = torch.get_rng_state()
    teacher = model.teacher.model(next(model.parameters()))
    assert torch.equal(state, torch.get_rng_state())
    before = copy.deepcopy(teacher.state_dict())
    batch = training_batch()
    sum(losses(model.train(), batch).values()).backward()
    report = estimate_population_statistics(model, [batch], 1)
    model.eval().train()

    assert list(model.state_dict()) == names
    inside = {id(p) for p in teacher.parameters()}
    assert not inside & {id(p) for p in model.parameters()}
    groups = build_optimizer(cfg, model).param_groups
    assert not inside & {id(p) for group in groups for p in group["params"]}
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[name], v) for name, v in teacher.state_dict().items())
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(report.layers) == len(layers)
    # moved with the model, shared by its copies
    model.double()
    assert {p.dtype for p in teacher.parameters()} == {torch.float64}
    assert copy.deepcopy(model).teacher is model.teacher


def test_inference_needs_no_teacher() -> None:
    cfg = retinanet_config(MODEL__META_ARCHITECTURE="DistilledRetinaNet")
    model = build_model(cfg).eval()
    with torch.no_grad():
        assert len(model(training_batch())) == 2
    with pytest.raises(ValueError, match="TEACHER_CONFIG is empty"):
        losses(model.train(), training_batch())


def test_teachers_by_name_and_wrong_ones(tmp_path: Path) -> None:
    ours = teacher_config("shapes/retinanet_bn_row1.yaml")
    assert ours.MODEL.RETINANET.HEAD_NAME == "MultiDomainBNRetinaNetHead"
    zoo = teacher_config("COCO-Detection/retinanet_R_101_FPN_3x.yaml")
    assert zoo.MODEL.RESNETS.DEPTH == 101
    cfg = student_config(tmp_path, MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS=[[1.0]])
    with pytest.raises(ValueError, match="anchors and classes"):
        losses(build_model(cfg), training_batch())
    wrong = cfg.clone()
    wrong.MODEL.DISTILL.TEMPERATURE = 0.0
    with pytest.raises(ValueError, match="TEMPERATURE must be above 0"):
        build_model(wrong)
    with pytest.raises(ValueError, match="nowhere.yaml"):
        teacher_config("nowhere.yaml")
    other = teacher_config(str(tmp_path / "teacher.yaml"))
    other.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    (tmp_path / "other.yaml").write_text(other.dump())
    with pytest.raises(ValueError, match="SemanticSegmentor, not a RetinaNet"):
        Teacher(str(tmp_path / "other.yaml"), "x").model(torch.zeros(1))


def test_what_is_missing_is_said_before_a_run(tmp_path: Path) -> None:
    cfg = student_config(tmp_path)
    check_teacher(cfg)
    cfg.MODEL.DISTILL.TEACHER_WEIGHTS = str(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match=r"TEACHER_WEIGHTS .*none\.pth"):
        check_teacher(cfg)
    cfg.MODEL.DISTILL.TEACHER_CONFIG = ""
    with pytest.raises(ValueError, match="TEACHER_CONFIG is empty"):
        check_teacher(cfg)
