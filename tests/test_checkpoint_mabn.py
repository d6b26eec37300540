"""Checkpoints of the official MABN code, and weights that lack MABN's statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn

from rethinking_bn.checkpoint import convert_mabn_checkpoint
from rethinking_bn.layers import MABN2d
from tests.engine.tiny import tiny_config
from tests.layers.mabn.reference import Reference

C, M = 3, 4


def official(iterations: int, classification: bool = False) -> tuple[Reference, dict[str, Tensor]]:
    """Train a layer by the formulas; return it, and what the official code would have saved."""
    reference = Reference(m=M, warmup=2, correction_start=5)
    weight, bias = torch.rand(C).double() + 0.5, torch.randn(C).double()
    squares, products = torch.zeros(2, M, C, dtype=torch.float64)
    for t in range(1, iterations + 1):
        y = reference.forward(torch.randn(2, C, 3, 3).double() * t, weight, bias)
        reference.backward(torch.randn_like(y))
        squares[t % M], products[t % M] = reference.s[-1], reference.p[-1]
    running = torch.ones(C).double() if reference.R is None else reference.R
    state = {"weight": weight, "bias": bias, "iters": torch.tensor([iterations])}
    if classification:  # statistics of the groups of images in its last iteration
        matrix = {"sta_matrix": torch.ones(2, 4), "pre_x2": squares[:2], "pre_gz": products[:2]}
        return reference, {**state, **matrix, "running_var": running}
    buffers = {"buffer_x2": squares, "buffer_gz": products}
    return reference, {**state, **buffers, "running_var": running.view(1, C, 1, 1)}


def layer(m: int = M) -> MABN2d:
    made = MABN2d(C, simulated_batch_size=2 * m, batch_size=2, warmup_iters=2, correction_start=5)
    return made.double()


@pytest.mark.parametrize("iterations", [0, 1, 3, 4, 5, 9])
def test_training_goes_on_where_the_official_code_stopped(iterations: int) -> None:
    reference, state = official(iterations)
    before = {key: value.clone() for key, value in state.items()}
    mine = layer()
    assert not any(mine.load_state_dict(state))
    assert mine.iterations == iterations
    for _ in range(6):
        x = torch.randn(2, C, 3, 3).double().requires_grad_()
        y, dy = mine(x), torch.randn(2, C, 3, 3).double()
        y.backward(dy)
        expected = reference.forward(x.detach(), state["weight"], state["bias"])
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(x.grad, reference.backward(dy)[0])
        torch.testing.assert_close(mine.running_mean_square, reference.R)
    assert all(torch.equal(value, before[key]) for key, value in state.items())


def test_other_window_and_missing_rings() -> None:
    _, state = official(9)
    shorter = layer(m=2)
    shorter.load_state_dict(state)
    newest = torch.stack([state["buffer_x2"][9 % M], state["buffer_x2"][8 % M]])
    torch.testing.assert_close(shorter.mean_square_ring.mean(), newest.mean(0))
    for dropped in ("iters", "buffer_gz"):
        mine = layer()
        mine.load_state_dict({key: value for key, value in state.items() if key != dropped})
        assert mine.iterations == 0
        assert torch.equal(mine.running_mean_square, state["running_var"].flatten())


def test_classification_code_gives_its_mean_square() -> None:
    _, state = official(9, classification=True)
    mine = layer()
    assert not any(mine.load_state_dict(state))
    assert mine.iterations == 0
    assert torch.equal(mine.running_mean_square, state["running_var"])


def test_a_batch_norms_variance_is_not_taken_for_a_mean_square() -> None:
    with pytest.raises(RuntimeError, match="running_mean_square"):
        layer().load_state_dict(nn.BatchNorm2d(C).state_dict())


def resnet_names(depth: int) -> dict[str, str]:
    """Return torchvision's name of every convolution and norm -> detectron2's."""
    blocks, convolutions = {18: ([2] * 4, 2), 50: ([3, 4, 6, 3], 3)}[depth]
    names = {"conv1": "stem.conv1", "bn1": "stem.conv1.norm"}
    for stage, number in enumerate(blocks):
        for block in range(number):
            old, new = f"layer{stage + 1}.{block}", f"res{stage + 2}.{block}"
            for i in range(1, convolutions + 1):
                names[f"{old}.conv{i}"] = f"{new}.conv{i}"
                names[f"{old}.bn{i}"] = f"{new}.conv{i}.norm"
        if stage or depth == 50:
            first = f"layer{stage + 1}.0.downsample", f"res{stage + 2}.0.shortcut"
            names[f"{first[0]}.0"], names[f"{first[0]}.1"] = first[1], f"{first[1]}.norm"
    return names


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.body.", "module.backbone.body."])
@pytest.mark.parametrize("depth", [18, 50])
def test_a_resnet_of_the_official_code_loads(depth: int, prefix: str, tmp_path: Path) -> None:
    cfg = tiny_config("", "", **{"MODEL__RESNETS__DEPTH": depth, "SOLVER__IMS_PER_BATCH": 2})
    if depth == 18:
        channels = {"STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": 64}
        cfg.MODEL.RESNETS.merge_from_list([x for pair in channels.items() for x in pair])
    backbone = BACKBONE_REGISTRY.get("build_mabn_resnet_fpn_backbone")(cfg, ShapeSpec(channels=3))
    model = nn.ModuleDict({"backbone": backbone})
    names = resnet_names(depth)
    detection = "body" in prefix  # its code has a stem and keeps rings
    saved = {f"{prefix}fc.weight": torch.ones(1)}
    theirs = {
        new: prefix + ("stem." if detection and new.startswith("stem.") else "") + old
        for old, new in names.items()
    }
    for new, old in theirs.items():
        part = backbone.bottom_up.get_submodule(new)
        saved[f"{old}.weight"] = torch.randn_like(part.weight)
        if isinstance(part, MABN2d):
            saved[f"{old}.bias"] = torch.randn_like(part.bias)
            shape = (1, -1, 1, 1) if detection else (-1,)
            saved[f"{old}.running_var"] = torch.rand_like(part.bias).view(shape)
            saved[f"{old}.iters"] = torch.tensor([7])
            for name in ("buffer_x2", "buffer_gz") if detection else ("sta_matrix", "pre_x2"):
                saved[f"{old}.{name}"] = torch.rand(16, part.num_features)
    before = dict(saved)
    converted = convert_mabn_checkpoint(saved)
    assert saved == before
    assert {key for key in converted if key.endswith("running_mean_square")} == {
        f"{new}.running_mean_square" for new in names.values() if new.endswith("norm")
    }
    torch.save(converted, tmp_path / "mabn.pth")
    DetectionCheckpointer(model).load(f"{tmp_path}/mabn.pth?matching_heuristics=True")
    for new, old in theirs.items():
        part = backbone.bottom_up.get_submodule(new)
        assert torch.equal(part.weight, saved[f"{old}.weight"]), new
        if isinstance(part, MABN2d):
            assert torch.equal(part.running_mean_square, saved[f"{old}.running_var"].flatten())
            assert part.iterations == (7 if detection else 0)


def test_what_is_no_official_checkpoint_is_refused() -> None:
    state = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).state_dict()
    with pytest.raises(ValueError, match="no layer of the official MABN code"):
        convert_mabn_checkpoint(state)
    _, mine = official(1)
    both = {f"{prefix}bn1.{k}": v for k, v in mine.items() for prefix in ("", "stem.")}
    with pytest.raises(ValueError, match="twice"):
        convert_mabn_checkpoint(both)
