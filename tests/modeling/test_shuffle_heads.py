"""Shuffle heads in one process: what is shuffled, by which permutation, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from rethinking_bn.modeling import (
    ShuffleBNBoxHead,
    ShuffleBNMaskHead,
)
from tests.modeling.roi_cases import (
    SHUFFLED,
    call,
    gradients,
    make_head,
    mask_config,
    permutation,
    record_orders,
    roi_inputs,
    rois,
    written_out,
)

KINDS = ("box", "mask")


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_process_group_groups_are_shuffled_locally(kind: str) -> None:
    """Defect 10: no process group is needed. NORM_IMAGES 1 with n images stands for n ranks."""
    rows = (5, 0, 3)
    head, plain = make_head(kind, shuffled=True, norm_images=1), make_head(kind)
    plain.load_state_dict(head.state_dict())
    head.set_iteration(11, 4)
    x, again = (rois(8).requires_grad_() for _ in range(2))
    with head.image_rows(rows):
        out = call(head, x)
    order = permutation(head, 8, 11, 4)
    expected, running = written_out(plain, again[order], [2, 3, 3])
    expected = expected[order.argsort()]
    torch.testing.assert_close(out, expected)
    weights = torch.arange(out.numel(), dtype=torch.float64).view_as(out)
    for result in (out, expected):
        (result.sin() * weights).sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    torch.testing.assert_close(gradients(head), gradients(plain))
    for conv, (mean, var) in zip(head.conv_norm_relus, running, strict=True):
        torch.testing.assert_close(conv.norm.running_mean, mean)
        torch.testing.assert_close(conv.norm.running_var, var)


@pytest.mark.parametrize("norm", ["BN", "BatchStatBN"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_inference_it_is_the_unshuffled_head_with_the_same_checkpoint(
    kind: str, norm: str
) -> None:
    shuffled, plain = (make_head(kind, shuffled=s, conv_norm=norm) for s in (True, False))
    call(shuffled, rois(6))
    call(plain, rois(5))
    x = rois(7)
    for source, target in ((shuffled, plain), (plain, shuffled)):
        call(source.train(), rois(4, seed=3))
        target.load_state_dict(source.state_dict())
        orders = record_orders(shuffled)
        assert torch.equal(call(source.eval(), x), call(target.eval(), x))
        assert torch.equal(orders[0], x[:, 0, 0, 0])
    assert torch.equal(call(shuffled, x[:0]), call(plain, x[:0]))


@pytest.mark.parametrize("norm", ["GN", "SyncBN", ""])
def test_norms_to_which_it_makes_no_difference_are_not_shuffled(norm: str) -> None:
    options: dict[str, Any] = {"conv_norm": norm, "conv_dims": [32]}
    head, plain = (make_head("box", shuffled=s, **options) for s in (True, False))
    plain.load_state_dict(head.state_dict())
    orders = record_orders(head)
    assert torch.equal(head(rois(9)), plain(rois(9))) and not head.communicates
    assert torch.equal(orders[0], rois(9)[:, 0, 0, 0])


@pytest.mark.parametrize("name", ["StandardROIHeads", "CascadeROIHeads", "NormImagesROIHeads"])
def test_in_detectron2s_roi_heads(name: str) -> None:
    cascade = {"MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": name == "CascadeROIHeads"}
    cfg = mask_config(MODEL__ROI_HEADS__NAME=name, **SHUFFLED, **cascade)
    heads = build_model(cfg).roi_heads
    boxes = list(heads.box_head) if name == "CascadeROIHeads" else [heads.box_head]
    assert all(type(head) is ShuffleBNBoxHead for head in boxes)
    assert type(heads.mask_head) is ShuffleBNMaskHead
    for counts in ([4, 3], [0, 0], [0, 2]):
        heads.train().zero_grad()
        with EventStorage():
            _, losses = heads(*roi_inputs(counts))
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())
        with torch.no_grad():
            instances, _ = heads.eval()(*roi_inputs(counts)[:3])
        assert all(i.pred_masks.isfinite().all() for i in instances)
        if not sum(counts):
            assert [len(i) for i in instances] == [0, 0]
