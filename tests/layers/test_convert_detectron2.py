"""Norms exchanged in built modules, and the convolutions before MABN centred."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ModulatedDeformConv, ShapeSpec
from detectron2.layers import get_norm as detectron2_norm
from detectron2.modeling import FPN, build_resnet_backbone
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from torch import Tensor, nn

from rethinking_bn.config import add_rethinking_bn_config
from rethinking_bn.layers import CenConv2d, MABN2d, get_norm
from rethinking_bn.modeling import centre_convolutions, convert_norms
from tests.engine.tiny import tiny_config

MABN = {"simulated_batch_size": 8, "batch_size": 2}


def convolution(norm: Any, bias: bool = True, **options: Any) -> Conv2d:
    return Conv2d(3, 32, 3, padding=1, bias=bias, norm=detectron2_norm(norm, 32), **options)


def box_head(norm: str = "BN") -> FastRCNNConvFCHead:
    shape = ShapeSpec(channels=32, height=5, width=5)
    return FastRCNNConvFCHead(shape, conv_dims=[32, 32], fc_dims=[16], conv_norm=norm)


def mask_head(norm: str = "BN") -> MaskRCNNConvUpsampleHead:
    shape = ShapeSpec(channels=32, height=5, width=5)
    return MaskRCNNConvUpsampleHead(shape, num_classes=2, conv_dims=[32, 32, 32], conv_norm=norm)


def randomize(norm: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias):
            tensor.uniform_(0.5, 2)


@pytest.mark.parametrize("old", ["BN", "SyncBN", "FrozenBN", "GN", "LN", "our LN"])
@pytest.mark.parametrize("new", ["GN", "MABN", "BN", "LN"])
def test_every_norm_is_exchanged_and_keeps_its_affine(old: str, new: str) -> None:
    norm = (lambda c: get_norm("LN", c)) if old == "our LN" else old
    module = nn.Sequential(convolution(norm, activation=torch.relu), nn.Conv2d(32, 4, 1))
    randomize(module[0].norm)
    weight, affine = module[0].weight, module[0].norm.weight.detach().clone()
    assert convert_norms(module, new) is module
    assert type(module[0].norm) is type(get_norm(new, 32))
    assert type(module[0]) is (CenConv2d if new == "MABN" else Conv2d)
    assert (module[0].bias is None) == (new == "MABN")
    assert module[0].weight is weight and module[0].activation is torch.relu
    assert torch.equal(module[0].norm.weight, affine)
    assert type(module[1]) is nn.Conv2d and module[1].bias is not None  # has no norm
    y = module(torch.randn(2, 3, 6, 6))
    y.sum().backward()
    assert y.shape == (2, 4, 6, 6) and weight.grad is not None


def test_what_the_convolution_was_told_is_kept() -> None:
    options = {"stride": 2, "dilation": 2, "padding_mode": "reflect", "groups": 4}
    old = Conv2d(8, 16, (3, 5), padding=(1, 2), norm=nn.BatchNorm2d(16), **options).double()
    new = convert_norms(old.eval(), "MABN", **MABN)
    assert isinstance(new, CenConv2d) and not new.training and not new.norm.training
    assert new.norm.running_mean_square.dtype == torch.float64
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    centred = old.weight - old.weight.mean((1, 2, 3), keepdim=True)
    with torch.no_grad():
        old.weight.copy_(centred)
        old.bias.zero_()
    torch.testing.assert_close(new(x), old._conv_forward(x, centred, None) / (1 + 1e-5) ** 0.5)


def test_building_draws_nothing() -> None:
    module = box_head()
    state = torch.get_rng_state()
    convert_norms(module, "MABN")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", [box_head, mask_head])
def test_heads_run_the_layers_that_were_put_in(make: Any) -> None:
    """detectron2 calls them from a list beside the registered modules."""
    head = make()
    convert_norms(head, "MABN", **MABN)
    assert all(type(layer) is CenConv2d for layer in head.conv_norm_relus)
    assert [id(layer) for layer in head.conv_norm_relus] == [
        id(module) for module in head.modules() if isinstance(module, CenConv2d)
    ]
    assert sum(isinstance(m, MABN2d) for m in head.modules()) == len(head.conv_norm_relus)
    forward = head.layers if make is mask_head else head
    forward(torch.randn(4, 32, 5, 5)).sum().backward()
    norms = [m for m in head.modules() if isinstance(m, MABN2d)]
    assert all(norm.iterations == 1 for norm in norms)
    assert all(p.grad is not None for p in head.parameters())


def test_fpn_runs_the_layers_that_were_put_in() -> None:
    cfg = tiny_config("", "", **{"MODEL__RESNETS__NORM": "BN", "MODEL__BACKBONE__FREEZE_AT": 0})
    add_rethinking_bn_config(cfg)
    bottom_up = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    fpn = FPN(bottom_up, ["res3", "res4", "res5"], 32, norm="BN")
    before = dict(fpn.named_parameters())
    convert_norms(fpn, "MABN", **MABN)
    assert all(p is before[name] for name, p in fpn.named_parameters() if p.dim() == 4)
    assert fpn.lateral_convs[::-1] == [fpn.fpn_lateral3, fpn.fpn_lateral4, fpn.fpn_lateral5]
    assert fpn.output_convs[::-1] == [fpn.fpn_output3, fpn.fpn_output4, fpn.fpn_output5]
    outputs = fpn(torch.randn(2, 3, 64, 64))
    sum(y.sum() for y in outputs.values()).backward()
    norms = [m for m in fpn.modules() if isinstance(m, MABN2d)]
    assert all(norm.iterations == 1 for norm in norms)


def test_a_shared_convolution_stays_shared() -> None:
    shared = convolution("BN")
    pair = convert_norms(nn.ModuleList([shared, nn.Sequential(shared)]), "MABN", **MABN)
    assert pair[0] is pair[1][0] and isinstance(pair[0], CenConv2d)
    assert len(list(pair.parameters())) == 3


def test_centring_alone() -> None:
    norm = MABN2d(32, **MABN)
    module = nn.Sequential(nn.Conv2d(3, 32, 1), norm, nn.ReLU(), nn.Conv2d(32, 4, 1))
    assert centre_convolutions(module) is module
    assert type(module[0]) is CenConv2d and module[1] is norm and type(module[3]) is nn.Conv2d
    assert centre_convolutions(module)[0] is module[0]
    assert len(module._load_state_dict_pre_hooks) == 1  # one warning, however often called


class Folded(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def broken() -> dict[str, tuple[nn.Module, str, str]]:
    """Return name -> (module, norm, message)."""
    bn = nn.BatchNorm2d(32)
    deformable = ModulatedDeformConv(4, 32, 3, norm=bn)
    return {
        "deformable": (nn.Sequential(deformable), "MABN", r"x\.0\.norm: .*ModulatedDeformConv"),
        "own forward": (nn.Sequential(Folded(3, 32, 1), bn), "MABN", r"x\.1: .*Folded"),
        "channels": (nn.Sequential(nn.Conv2d(3, 8, 3), bn), "MABN", r"x\.1 has 32 .* has 8"),
        "two norms": (nn.Sequential(convolution("BN"), bn), "MABN", r"x\.1: .*nothing"),
        "no convolution": (nn.Sequential(bn, nn.Conv2d(32, 3, 1)), "MABN", r"x\.0: .* nothing"),
        "one weight": (nn.Sequential(nn.Conv2d(1, 32, 1), bn), "MABN", r"x\.1: .* one weight"),
        "empty": (convolution("BN"), "", "nothing to convert to"),
    }


@pytest.mark.parametrize("case", broken())
def test_what_cannot_be_converted_is_named_and_left_alone(case: str) -> None:
    broken_module, norm, message = broken()[case]
    module = nn.ModuleDict({"fine": nn.Sequential(convolution("GN")), "x": broken_module})
    before = list(module.modules())
    with pytest.raises(ValueError, match=message):
        convert_norms(module, norm)
    assert list(module.modules()) == before


def loads(module: nn.Module, state: dict[str, Tensor], caplog: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "rethinking_bn"):
        module.load_state_dict(state, strict=False)
    return [record.getMessage() for record in caplog.records]


def test_weights_without_their_mean_square_are_warned_of_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain, fused = box_head(), box_head(norm="")
    converted = convert_norms(box_head(), "MABN", **MABN)
    model = nn.ModuleDict({"backbone": nn.Conv2d(3, 3, 1), "head": converted})

    def state(head: nn.Module) -> dict[str, Tensor]:
        return nn.ModuleDict({"head": head}).state_dict()

    for source in (plain, fused):  # a BN's weights; filters whose norm was fused into them
        (line,) = loads(model, state(source), caplog)
        assert "2 MABN layers get weights without running_mean_square (head.conv1.norm" in line
        assert "\n" not in line and "TEST.PRECISE_BN.ENABLED" in line
    copies = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert len(loads(copies, state(plain), caplog)) == 1
    # nothing of the head, all of it, or the official code's layout: nothing to say
    assert not loads(model, {"backbone.weight": torch.zeros(3, 3, 1, 1)}, caplog)
    assert not loads(model, state(convert_norms(box_head(), "MABN")), caplog)
    official = {
        key.replace("running_mean_square", "running_var"): value.view(1, -1, 1, 1)
        if key.endswith("running_mean_square")
        else value
        for key, value in state(converted).items()
        if "ring" not in key
    }
    assert not loads(model, official, caplog)
    assert not loads(convert_norms(box_head(), "GN"), plain.state_dict(), caplog)


def test_frozen_batch_norm_becomes_trainable() -> None:
    module = convert_norms(convolution("FrozenBN"), "GN")
    assert not isinstance(module.norm, FrozenBatchNorm2d) and module.norm.weight.requires_grad
    fixed = convolution("BN").requires_grad_(False)
    assert not any(p.requires_grad for p in convert_norms(fixed, "MABN").parameters())
