"""NormBoxHead and NormMaskHead: detectron2's heads but for the norm layers."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from rethinking_bn.layers import (
    BatchNorm2d,
    BatchStatNorm2d,
    CenConv2d,
    MABN2d,
    SyncBatchNorm2d,
    batch_norm,
    norm_names,
)
from rethinking_bn.modeling import NormBoxHead, NormMaskHead
from tests.modeling.roi_cases import call, make_head, mask_config, norms
from tests.rois import rois

WIDE = ShapeSpec(channels=32, height=3, width=3)
KINDS = {
    "box": (NormBoxHead, FastRCNNConvFCHead, {"conv_dims": [32, 32], "fc_dims": [6]}),
    "mask": (NormMaskHead, MaskRCNNConvUpsampleHead, {"conv_dims": [32] * 3, "num_classes": 2}),
}


@pytest.mark.parametrize("norm", ["", "BN", "GN"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_detectron2s_head_initialisation_included(kind: str, norm: str) -> None:
    ours, stock, arguments = KINDS[kind]
    heads = []
    for head_class in (ours, stock):
        torch.manual_seed(3)
        heads.append(head_class(WIDE, **arguments, conv_norm=norm))
    left, right = (head.state_dict() for head in heads)
    assert list(left) == list(right)
    assert all(torch.equal(left[key], right[key]) for key in left)
    x = torch.randn(5, 32, 3, 3)
    for training in (True, False):
        mine, theirs = (head.train(training) for head in heads)
        expected = theirs.layers(x) if kind == "mask" else theirs(x)
        torch.testing.assert_close(call(mine, x), expected)


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_without_statistics_are_refused(
    kind: str, shuffled: bool, norm: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Defect 20: the head would start at mean 0, variance 1 under trained weights."""
    without = make_head(kind, conv_norm="").state_dict()
    head = make_head(kind, shuffled=shuffled, conv_norm=norm)
    for model, prefix in ((head, ""), (nn.Sequential(head), "0.")):
        match = rf"(?s){prefix}\w+.norm.running_mean.*ALLOW_MISSING_STATISTICS"
        with pytest.raises(RuntimeError, match=match):
            weights = {prefix + key: value for key, value in without.items()}
            model.load_state_dict(weights, strict=False)
    allowed = make_head(kind, shuffled=shuffled, conv_norm=norm, allow_missing_statistics=True)
    result = allowed.load_state_dict(without, strict=False)
    assert not [key for key in result.missing_keys if "running" in key]
    assert "stay as they are" in caplog.text
    for name, buffer in allowed.named_buffers():
        if "running" in name:
            assert torch.equal(buffer, torch.full_like(buffer, float("var" in name)))
    head.load_state_dict(allowed.state_dict())
    head.load_state_dict({}, strict=False)  # an ImageNet backbone: the head starts anew


@pytest.mark.parametrize("kind", KINDS)
def test_every_norm_name_builds_its_layer(kind: str) -> None:
    expected = {
        "": type(None),
        "BN": BatchNorm2d,
        "SyncBN": SyncBatchNorm2d,
        "BatchStatBN": BatchStatNorm2d,
        "GN": nn.GroupNorm,
        "MABN": MABN2d,
        "FrozenBN": FrozenBatchNorm2d,
    }
    ours, _, arguments = KINDS[kind]
    assert set(norm_names()) - set(expected) == {"LN", "IN"}
    for name, layer_class in expected.items():
        options = {"batch_size": 1} if name == "MABN" else {}
        head = ours(WIDE, **arguments, conv_norm=name, norm_arguments=options)
        assert all(type(conv.norm) is layer_class for conv in head.conv_norm_relus)
        assert all((conv.bias is None) == bool(name) for conv in head.conv_norm_relus)
        centred = [isinstance(conv, CenConv2d) for conv in head.conv_norm_relus]
        assert centred == [name == "MABN"] * 2
        # the modules that run are the ones in the list
        assert list(head)[:2] == head.conv_norm_relus
        assert call(head, torch.randn(3, 32, 3, 3)).isfinite().all()
    made = ours(WIDE, **arguments, conv_norm=lambda c: nn.BatchNorm2d(c, eps=0.5))
    assert [conv.norm.eps for conv in made.conv_norm_relus] == [0.5, 0.5]


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_norm_is_an_error_that_lists_the_known_ones(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"MODEL.ROI_{kind.upper()}_HEAD.NORM .*SyncBN.*'BNN'"):
        make_head(kind, conv_norm="BNN")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["BN", "SyncBN", "BatchStatBN", "GN", "LN", "MABN", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_no_rois_give_no_results_and_leave_statistics_alone(
    kind: str, norm: str, training: bool
) -> None:
    """Defect 11, in one process."""
    ours, _, arguments = KINDS[kind]
    options = {"batch_size": 1} if norm == "MABN" else {}
    head = ours(WIDE, **arguments, conv_norm=norm, norm_arguments=options).train(training)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    x = torch.empty(0, 32, 3, 3, requires_grad=True)
    out = call(head, x)
    assert out.shape == ((0, 6) if kind == "box" else (0, 2, 6, 6))
    out.sum().backward()
    assert x.grad is not None
    # data-parallel training waits for every one of them
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())
    after = head.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_models_from_config_read_the_keys() -> None:
    cfg = mask_config(**norms("MABN"), SOLVER__IMS_PER_BATCH=4, MODEL__MABN__R_MAX=3.0)
    heads = build_model(cfg).roi_heads
    for head in (heads.box_head, heads.mask_head):
        for conv in head.conv_norm_relus:
            assert isinstance(conv, CenConv2d) and isinstance(conv.norm, MABN2d)
            assert conv.norm.batch_size == 4 and conv.norm.r_max == 3.0
    assert heads.mask_head.predictor.out_channels == 3
    agnostic = mask_config(MODEL__ROI_MASK_HEAD__CLS_AGNOSTIC_MASK=True)
    assert build_model(agnostic).roi_heads.mask_head.predictor.out_channels == 1


def test_a_syncbn_config_runs_in_one_process_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect 13: the YAML of eight GPUs, unchanged."""
    batch_norm._say_alone.cache_clear()
    said: list[str] = []
    monkeypatch.setattr(batch_norm.logger, "info", said.append)
    head, plain = make_head("box", conv_norm="SyncBN"), make_head("box")
    plain.load_state_dict(head.state_dict())
    torch.testing.assert_close(head(rois(4)), plain(rois(4)))
    assert len(said) == 1 and "SyncBN in one process" in said[0]
