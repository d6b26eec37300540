"""Shuffle heads in one process: what is shuffled, by which permutation, and when."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from rethinking_bn.modeling import (
    NormBoxHead,
    NormMaskHead,
    ShuffleBNBoxHead,
    ShuffleBNMaskHead,
)
from rethinking_bn.shuffle.layers import point_of_return
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


def wide(head_class: Any, size: int, **arguments: Any) -> tuple[list[nn.Module], tuple[int, ...]]:
    shape = ShapeSpec(channels=256, height=size, width=size)
    with torch.device("meta"):
        return list(head_class(shape, conv_norm="BN", **arguments)), (256, size, size)


@pytest.mark.parametrize(
    ("head_class", "size", "arguments", "layers_shuffled", "numbers"),
    [
        (NormBoxHead, 7, {"conv_dims": [256] * 4, "fc_dims": [1024]}, 7, 1024),
        (NormBoxHead, 7, {"conv_dims": [256] * 4, "fc_dims": [1024, 512]}, 9, 512),
        (NormBoxHead, 7, {"conv_dims": [256] * 4, "fc_dims": []}, 4, 256 * 49),
        (NormBoxHead, 7, {"conv_dims": [16], "fc_dims": [1024]}, 2, 16 * 49),
        (NormMaskHead, 14, {"conv_dims": [256] * 5, "num_classes": 80}, 4, 256 * 14**2),
        (NormMaskHead, 14, {"conv_dims": [256] * 5, "num_classes": 3}, 7, 3 * 28**2),
        (NormMaskHead, 14, {"conv_dims": [256] * 4 + [8], "num_classes": 80}, 6, 8 * 28**2),
    ],
)
def test_rows_return_where_they_are_smallest(
    head_class: Any, size: int, arguments: dict[str, Any], layers_shuffled: int, numbers: int
) -> None:
    layers, shape = wide(head_class, size, **arguments)
    last = max(i for i, layer in enumerate(layers) if getattr(layer, "norm", None) is not None)
    end = point_of_return(layers, last, shape)
    assert end == layers_shuffled
    x = torch.empty(2, *shape, device="meta")
    sizes = []
    for layer in layers:
        x = layer(x)
        sizes.append(x[0].numel())
    assert sizes[end - 1] == numbers == min(sizes[last:])


@pytest.mark.parametrize("norm", ["GN", "SyncBN", ""])
def test_norms_to_which_it_makes_no_difference_are_not_shuffled(norm: str) -> None:
    options: dict[str, Any] = {"conv_norm": norm, "conv_dims": [32]}
    head, plain = (make_head("box", shuffled=s, **options) for s in (True, False))
    plain.load_state_dict(head.state_dict())
    orders = record_orders(head)
    assert torch.equal(head(rois(9)), plain(rois(9))) and not head.communicates
    assert torch.equal(orders[0], rois(9)[:, 0, 0, 0])


def test_frozen_statistics_are_not_shuffled() -> None:
    head = make_head("mask", shuffled=True)
    assert head.communicates
    for conv in head.conv_norm_relus:
        conv.norm.eval()
    assert head.training and not head.communicates


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_saves_with_a_history(kind: str) -> None:
    head = make_head(kind, shuffled=True)
    head.set_iteration(1, 2)
    call(head, rois(5))
    twin = copy.deepcopy(head)
    assert torch.equal(call(head, rois(5)), call(twin, rois(5)))
    assert not [key for key in head.state_dict() if "iteration" in key or "call" in key]


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
