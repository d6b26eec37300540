"""NormBoxHead and NormMaskHead, and MODEL.ROI_HEADS.NORM_IMAGES: RoIs of k images at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from detectron2.utils.events import EventStorage
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
from rethinking_bn.modeling import NormBoxHead, NormImagesROIHeads, NormMaskHead
from rethinking_bn.population import estimate_population_statistics
from tests.modeling.roi_cases import (
    CASCADE,
    call,
    make_head,
    mask_config,
    norms,
    roi_inputs,
    written_out,
)
from tests.rois import gradients, population, rois, running

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


@pytest.mark.parametrize("kind", KINDS)
def test_batch_statistics_at_inference_load_a_bn_checkpoint_and_the_reverse(kind: str) -> None:
    trained = make_head(kind)
    for _ in range(3):
        call(trained, rois(6))
    by_batch = make_head(kind, conv_norm="BatchStatBN")
    by_batch.load_state_dict(trained.state_dict())
    trained.load_state_dict(by_batch.state_dict())
    x = rois(6, seed=1)
    expected = call(trained, x)  # in training mode: by the mini-batch
    torch.testing.assert_close(call(by_batch.eval(), x), expected)
    assert (call(trained.eval(), x) - expected).abs().max() > 0.01


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


def groups(rows: tuple[int, ...], k: int) -> list[int]:
    return [sum(rows[i : i + k]) for i in range(0, len(rows), k)]


@pytest.mark.parametrize("rows", [(3, 2, 4, 1), (0, 5, 2, 0), (0, 0, 3, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_each_group_by_itself(kind: str, k: int, rows: tuple[int, ...]) -> None:
    head, copy = make_head(kind, norm_images=k), make_head(kind)
    copy.load_state_dict(head.state_dict())
    x, again = (rois(sum(rows)).requires_grad_() for _ in range(2))
    with head.image_rows(rows):
        out = call(head, x)
    expected, statistics = written_out(copy, again, groups(rows, k))
    torch.testing.assert_close(out, expected)
    out.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    torch.testing.assert_close(gradients(head), gradients(copy))
    torch.testing.assert_close(running(head), statistics)


@pytest.mark.parametrize("kind", KINDS)
def test_mini_batch_statistics_at_inference_take_each_image_by_itself(kind: str) -> None:
    rows = (3, 0, 4)
    head = make_head(kind, conv_norm="BatchStatBN", norm_images=2).eval()
    x = rois(7)
    with head.image_rows(rows):
        together = call(head, x)
    everything = make_head(kind, conv_norm="BatchStatBN").eval()
    everything.load_state_dict(head.state_dict())
    one_by_one = [call(everything, part) for part in x.split(list(rows))]
    torch.testing.assert_close(together, torch.cat(one_by_one))
    assert not torch.allclose(call(everything, x), together)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_norm": "SyncBN", "norm_images": 1}, "NORM_IMAGES.*1.*SyncBatchNorm2d"),
        ({"conv_norm": "MABN", "norm_images": 1}, "NORM_IMAGES.*1.*MABN2d"),
        ({"conv_norm": nn.BatchNorm2d, "norm_images": 2}, "NORM_IMAGES.*2.*BatchNorm2d"),
        ({"conv_norm": "BN", "norm_images": -1}, "NORM_IMAGES.*-1"),
    ],
)
def test_what_cannot_be_is_refused_at_build(
    kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_head(kind, **options)


def test_uneven_images_and_missing_row_counts_are_errors() -> None:
    head = make_head("box", norm_images=2)
    with pytest.raises(ValueError, match="image_rows"):
        head(rois(3))
    for rows, message in (((1, 1, 1), "2 does not divide the 3 images"), ((1, 3), "sum up")):
        with pytest.raises(ValueError, match=message), head.image_rows(rows):
            head(rois(3))
    # nothing is left behind
    with pytest.raises(ValueError, match="image_rows"):
        head(rois(3))
    with head.image_rows((1, 2)):
        assert head(rois(3)).isfinite().all()


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        ("HEADS", "StandardROIHeads", "StandardROIHeads does not tell"),
        ("HEADS", "CascadeROIHeads", "CascadeROIHeads does not.*NormImagesCascadeROIHeads"),
        ("BOX_HEAD", "FastRCNNConvFCHead", "FastRCNNConvFCHead.*ROI_BOX_HEAD"),
        ("MASK_HEAD", "MaskRCNNConvUpsampleHead", "MaskRCNNConvUpsampleHead.*ROI_MASK_HEAD"),
    ],
)
def test_configs_that_would_ignore_it_are_refused(part: str, name: str, message: str) -> None:
    keys = {f"MODEL__ROI_{part}__NAME": name, "MODEL__ROI_HEADS__NORM_IMAGES": 1}
    with pytest.raises(ValueError, match=message):
        build_model(mask_config(**{**CASCADE, **keys} if "Cascade" in name else keys))


def record_groups(heads: list[nn.Module]) -> list[tuple[int, ...] | None]:
    """Return a list to which the first norm of each head adds the groups that it normalises."""
    groups: list[tuple[int, ...] | None] = []

    def record(norm: Any, args: Any) -> None:
        assert norm._groups is None or sum(norm._groups) == len(args[0])
        groups.append(norm._groups)

    for head in heads:
        head.conv_norm_relus[0].norm.register_forward_pre_hook(record)
    return groups


def test_roi_heads_tell_the_heads_in_training_and_inference() -> None:
    heads = build_model(mask_config(MODEL__ROI_HEADS__NORM_IMAGES=1)).roi_heads
    recorded = record_groups([heads.box_head, heads.mask_head])
    images, features, proposals, targets = roi_inputs([3, 9, 0])
    with EventStorage():
        sampled, losses = heads(images, features, proposals, targets)
    sum(losses.values()).backward()
    rows = tuple(len(of_image) for of_image in sampled)
    foreground = tuple(int((p.gt_classes != 3).sum()) for p in sampled)
    assert recorded == [rows, foreground] and rows[2] == 0 and foreground[0] > 0

    recorded.clear()
    with torch.no_grad():
        instances, _ = heads.eval()(images, features, roi_inputs([3, 9, 0])[2])
    assert recorded == [(3, 9, 0), tuple(len(i) for i in instances)]


def test_a_cascade_tells_every_stage_its_own_counts() -> None:
    cfg = mask_config(MODEL__ROI_HEADS__NORM_IMAGES=1, **CASCADE)
    cfg.MODEL.ROI_HEADS.NAME = "NormImagesCascadeROIHeads"
    heads = build_model(cfg).roi_heads
    recorded = record_groups([*heads.box_head, heads.mask_head])
    with EventStorage():
        _, losses = heads(*roi_inputs([3, 6]))
    sum(losses.values()).backward()
    assert [groups is not None and len(groups) for groups in recorded] == [2] * 4


def test_with_0_it_is_detectron2s_roi_heads() -> None:
    torch.manual_seed(0)
    ours = build_model(mask_config()).roi_heads
    stock = build_model(mask_config(MODEL__ROI_HEADS__NAME="StandardROIHeads")).roi_heads
    assert type(ours) is NormImagesROIHeads and type(stock) is StandardROIHeads
    stock.load_state_dict(ours.state_dict())
    losses = []
    for heads in (ours, stock):
        torch.manual_seed(1)
        with EventStorage():
            losses.append(heads(*roi_inputs([5, 2]))[1])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("labelled", [True, False])
def test_population_training_normalises_the_same_batches(labelled: bool) -> None:
    """The second layer's input depends on what the first one normalised together."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = make_head("box", norm_images=2)

        def forward(self, rows: tuple[int, ...]) -> torch.Tensor:
            with self.head.image_rows(rows):
                return self.head(rois(sum(rows), seed=len(rows)))

    model, batches = Model(), [(3, 2, 4, 1), (0, 3)]
    report = estimate_population_statistics(model, batches, 2, labelled=labelled, progress=False)
    assert not report.unreached
    xs = [rois(sum(rows), seed=len(rows)) for rows in batches]
    expected = population(model.head, xs, [groups(rows, 2) for rows in batches])
    torch.testing.assert_close(running(model.head), expected)
