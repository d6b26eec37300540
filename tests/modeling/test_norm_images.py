"""MODEL.ROI_HEADS.NORM_IMAGES: the RoIs of k images at a time are a normalisation batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.utils.events import EventStorage
from torch import nn

from rethinking_bn.modeling import NormImagesROIHeads
from rethinking_bn.population import estimate_population_statistics
from tests.modeling.roi_cases import (
    CASCADE,
    KINDS,
    call,
    make_head,
    mask_config,
    roi_inputs,
    written_out,
)
from tests.rois import gradients, population, rois, running


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
