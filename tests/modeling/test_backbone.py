"""Backbones with GN or MABN throughout: built from detectron2's, frozen, loaded, evaluated."""

from __future__ import annotations

import logging
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, DeformConv, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import nn

from rethinking_bn.layers import CenConv2d, MABN2d
from tests.engine.tiny import tiny_config

IMAGE = ShapeSpec(channels=3)
KINDS = ("resnet", "resnet_fpn", "retinanet_resnet_fpn")
STATISTICS = ("running_mean_square", "count", "last_16")


def config(depth: int = 50, **overrides: Any) -> CfgNode:
    """Return a config of a narrow ResNet (of the full width where detectron2 insists on it)."""
    narrow = depth >= 50
    return tiny_config(
        "no data",
        "no output",
        **{
            "MODEL__RESNETS__DEPTH": depth,
            "MODEL__RESNETS__NORM": "FrozenBN",
            "MODEL__RESNETS__STEM_OUT_CHANNELS": 32 if narrow else 64,
            "MODEL__RESNETS__RES2_OUT_CHANNELS": 64,
            "MODEL__RESNETS__WIDTH_PER_GROUP": 32,
            "MODEL__FPN__OUT_CHANNELS": 32,
            "SOLVER__IMS_PER_BATCH": 2,
            **overrides,
        },
    )


def build(kind: str, norm: str, cfg: CfgNode) -> Backbone:
    cfg = cfg.clone()
    cfg.freeze()
    return BACKBONE_REGISTRY.get(f"build_{norm}{kind}_backbone")(cfg, IMAGE)


def norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, (nn.GroupNorm, MABN2d))]


@pytest.mark.parametrize(
    ("kind", "norm", "depth"), list(product(KINDS, ("gn_", "mabn_"), (18, 50)))
)
def test_builds_trains_a_step_and_evaluates(kind: str, norm: str, depth: int) -> None:
    backbone = build(kind, norm, config(depth))
    expected = build(kind, "", config(depth, MODEL__RESNETS__NORM="GN"))
    convolutions = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    levels = 0 if kind == "resnet" else 3
    layers = {18: 20, 50: 53}[depth] + 2 * levels
    assert len(norms(backbone)) == layers
    assert all(isinstance(m, MABN2d) == (norm == "mabn_") for m in norms(backbone))
    centred = [m for m in convolutions if isinstance(m, CenConv2d)]
    assert len(centred) == (layers if norm == "mabn_" else 0)
    assert all(m.bias is None for m in convolutions if getattr(m, "norm", None) is not None)

    optimizer = torch.optim.SGD(backbone.parameters(), 0.01)
    x = torch.randn(2, 3, 64, 64)
    outputs = backbone(x)
    assert {k: v.shape for k, v in outputs.items()} == {k: v.shape for k, v in expected(x).items()}
    assert backbone.output_shape() == expected.output_shape()
    sum(y.square().mean() for y in outputs.values()).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    optimizer.step()
    if norm == "mabn_":
        assert all(layer.iterations == 1 for layer in norms(backbone))
    with torch.no_grad():
        evaluated = backbone.eval()(x[:1])
    assert all(torch.isfinite(y).all() for y in evaluated.values())


@pytest.mark.parametrize("depth", [34, 101, 152])
@pytest.mark.parametrize("norm", ["gn_", "mabn_"])
def test_other_depths_build(norm: str, depth: int) -> None:
    with torch.device("meta"):
        backbone = build("resnet_fpn", norm, config(depth))
    assert len(norms(backbone)) == {34: 36, 101: 104, 152: 155}[depth] + 6


@pytest.mark.parametrize("kind", KINDS)
def test_gn_is_what_detectron2_builds_with_gn(kind: str) -> None:
    models = []
    for norm in ("gn_", ""):
        torch.manual_seed(1)
        cfg = config(MODEL__RESNETS__NORM="GN", MODEL__FPN__NORM="GN", MODEL__BACKBONE__FREEZE_AT=2)
        models.append((build(kind, norm, cfg), torch.get_rng_state()))
    (ours, state), (stock, expected_state) = models
    assert torch.equal(state, expected_state)
    assert str(ours) == str(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(p, q) and p.requires_grad == q.requires_grad, name
    x = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(y, z) for y, z in zip(ours(x).values(), stock(x).values(), strict=True))


def test_p6_and_p7_stay_plain_convolutions() -> None:
    top = build("retinanet_resnet_fpn", "mabn_", config()).top_block
    assert isinstance(top, LastLevelP6P7)
    assert all(type(layer) is nn.Conv2d and layer.bias is not None for layer in (top.p6, top.p7))


def test_the_keys_of_mabn_reach_every_layer() -> None:
    cfg = config(
        MODEL__MABN__SIMULATED_BATCH_SIZE=12,
        MODEL__MABN__MOMENTUM=0.1,
        MODEL__MABN__WARMUP_ITERS=7,
        MODEL__MABN__R_MAX=2.0,
    )
    for batch_size, expected in ((0, 2), (3, 3)):
        cfg.MODEL.MABN.BATCH_SIZE = batch_size
        for layer in norms(build("resnet_fpn", "mabn_", cfg)):
            assert (layer.simulated_batch_size, layer.batch_size) == (12, expected)
            assert (layer.momentum, layer.warmup_iters, layer.r_max) == (0.1, 7, 2.0)


def test_a_batch_size_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="SIMULATED_BATCH_SIZE 32 .*MODEL.MABN.BATCH_SIZE 3$"):
        build("resnet", "mabn_", config(MODEL__MABN__BATCH_SIZE=3))
    # images per rank that only these ranks have: evaluation works, training does not start
    backbone = build("resnet", "mabn_", config(SOLVER__IMS_PER_BATCH=3))
    x = torch.randn(3, 3, 64, 64)
    backbone.eval()(x)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(ValueError, match="simulated batch size 32 .* batch size 3"):
        backbone.train()(x)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("freeze_at", range(6))
@pytest.mark.parametrize(("kind", "norm"), [("resnet", "gn_"), ("resnet_fpn", "mabn_")])
def test_frozen_stages_stay_as_they_are(kind: str, norm: str, freeze_at: int) -> None:
    backbone = build(kind, norm, config(MODEL__BACKBONE__FREEZE_AT=freeze_at)).train()
    frozen = tuple(
        ("bottom_up." if kind != "resnet" else "") + stage
        for stage in ("stem.", "res2.", "res3.", "res4.", "res5.")[:freeze_at]
    )
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen or ("none",)), name
    trained = [p for p in backbone.parameters() if p.requires_grad]
    outputs = backbone(torch.randn(2, 3, 64, 64))
    if trained:
        sum(y.square().sum() for y in outputs.values()).backward()
        torch.optim.SGD(trained, 1e-3).step()
    for name, tensor in backbone.state_dict().items():
        moved = not torch.equal(tensor, before[name])
        if name.startswith(frozen or ("none",)):
            assert not moved, name
        elif name.endswith(("running_mean_square", "count")):
            assert moved, name
    if freeze_at and norm == "mabn_":
        assert not backbone.bottom_up.stem.conv1.norm.training  # type: ignore[union-attr]


def test_deformable_stages() -> None:
    stages = [False, True, True, True]
    cfg = config(MODEL__RESNETS__DEFORM_ON_PER_STAGE=stages)
    backbone = build("resnet", "gn_", cfg)
    deformable = [m for m in backbone.modules() if isinstance(m, DeformConv)]
    assert len(deformable) == 4 + 6 + 3
    assert all(isinstance(m.norm, nn.GroupNorm) for m in deformable)
    with pytest.raises(ValueError, match=r"DEFORM_ON_PER_STAGE is \[False, True, True, True\]"):
        build("resnet", "mabn_", cfg)


def test_gn_needs_channels_that_its_groups_divide() -> None:
    with pytest.raises(ValueError, match="conv1.norm: GN has 32 groups"):
        build("resnet", "gn_", config(MODEL__RESNETS__STEM_OUT_CHANNELS=24))


class Detector(nn.Module):
    """A backbone where detectron2's detectors have it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["gn_", "mabn_"])
def test_a_plain_checkpoint_leaves_no_key_over_but_the_statistics(
    kind: str, norm: str, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config(MODEL__RESNETS__NORM="BN", MODEL__FPN__NORM="BN")
    plain, model = Detector(build(kind, "", cfg)), Detector(build(kind, norm, cfg))
    with caplog.at_level(logging.WARNING):
        result = DetectionCheckpointer(model)._load_model({"model": plain.state_dict()})
    missing = [] if norm == "gn_" else ["running_mean_square"]
    assert [key for key in result.missing_keys if not key.endswith(tuple(missing or ["-"]))] == []
    assert {key.rpartition(".")[2] for key in result.missing_keys} == set(missing)
    assert len(result.missing_keys) == (len(norms(model)) if missing else 0)
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    assert {key.rpartition(".")[2] for key in result.unexpected_keys} == statistics
    assert not result.incorrect_shapes
    loaded = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(loaded[name], parameter), name
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("rethinking_bn")]
    assert len(lines) == len(missing)
    if lines:
        assert "backbone." in lines[0] and "evaluating" in lines[0] and "\n" not in lines[0]


@pytest.mark.parametrize("suffix", ["", "?matching_heuristics=True"])
def test_imagenet_weights_of_another_norm_are_warned_of(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The backbone's weights alone, named as detectron2's ImageNet models are."""
    resnet = build("resnet", "", config(MODEL__RESNETS__NORM="FrozenBN"))
    prefix = "" if suffix else "backbone.bottom_up."
    state = {prefix + key: value for key, value in resnet.state_dict().items()}
    torch.save(state, tmp_path / "R-50.pth")
    model = Detector(build("resnet_fpn", "mabn_", config()))
    with caplog.at_level(logging.WARNING, "rethinking_bn"):
        DetectionCheckpointer(model).load(f"{tmp_path}/R-50.pth{suffix}")
    loaded = model.backbone.bottom_up.stem.conv1.weight
    assert torch.equal(loaded, resnet.stem.conv1.weight)
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("rethinking_bn")]
    assert line.startswith("53 MABN layers get weights without running_mean_square")


def test_its_own_checkpoint_loads_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    source, target = (Detector(build("resnet_fpn", "mabn_", config())) for _ in range(2))
    source.backbone(torch.randn(2, 3, 64, 64))
    state = source.state_dict()
    assert {key.rpartition(".")[2] for key in state} - {"weight", "bias"} == set(STATISTICS)
    with caplog.at_level(logging.WARNING):
        assert not any(target.load_state_dict(state))
    assert not caplog.records
    x = torch.randn(1, 3, 64, 64)
    got, want = target.eval().backbone(x), source.eval().backbone(x)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_norm_keys_are_replaced_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    cfg = config(MODEL__RESNETS__NORM="SyncBN", MODEL__FPN__NORM="")
    with caplog.at_level(logging.INFO, "rethinking_bn"):
        backbone = build("resnet_fpn", "mabn_", cfg)
    assert not any(isinstance(m, nn.SyncBatchNorm) or type(m) is Conv2d for m in backbone.modules())
    assert [record.getMessage() for record in caplog.records] == [
        "The backbone has MABN where MODEL.RESNETS.NORM says 'SyncBN'",
        "The backbone has MABN where MODEL.FPN.NORM says ''",
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, "rethinking_bn"):
        build("resnet", "mabn_", config(MODEL__RESNETS__NORM="MABN"))
    assert not caplog.records
