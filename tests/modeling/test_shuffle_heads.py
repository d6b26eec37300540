"""Shuffle heads in one process: what is shuffled, by which permutation, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rethinking_bn.modeling import ShuffleBNBoxHead, ShuffleBNMaskHead
from rethinking_bn.randomness import announce_iteration
from tests.modeling.roi_cases import (
    KINDS,
    SHUFFLED,
    call,
    make_head,
    mask_config,
    order_of,
    roi_inputs,
    written_out,
)
from tests.rois import gradients, loss, permutation, record_orders, rois, running


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
    expected, statistics = written_out(plain, again[order], [2, 3, 3])
    expected = expected[order.argsort()]
    torch.testing.assert_close(out, expected)
    (loss(out) + loss(expected)).backward()
    torch.testing.assert_close(x.grad, again.grad)
    torch.testing.assert_close(gradients(head), gradients(plain))
    torch.testing.assert_close(running(head), statistics)


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


def test_permutations_follow_from_run_seed_iteration_head_and_call() -> None:
    box, mask = make_head("box", shuffled=True), make_head("mask", shuffled=True)
    seen = set()
    for run_seed, iteration in ((0, 0), (0, 1), (1, 0), (1, 1)):
        announce_iteration(nn.ModuleList([box, mask]), run_seed, iteration)
        seen |= {order_of(box), order_of(box), order_of(mask)}
    assert len(seen) == 12
    # a resumed run, with another head object and another history
    resumed = make_head("box", shuffled=True)
    order_of(resumed)
    box.set_iteration(7, 100)
    resumed.set_iteration(7, 100)
    assert order_of(box) == order_of(resumed) and order_of(box) == order_of(resumed)


def test_without_announcements_the_event_storage_tells_the_iteration() -> None:
    head, orders = make_head("box", shuffled=True), []
    for start in (0, 0, 5):
        with EventStorage(start) as storage:
            for _ in range(2):
                orders.append(order_of(head))
                storage.step()
            orders.append(order_of(head))
    resumed = make_head("box", shuffled=True)
    with EventStorage(6):
        assert order_of(resumed) == orders[7]
    assert orders[:3] == orders[3:6] and len(set(orders)) == 6
    alone = make_head("box", shuffled=True)  # neither: the calls are counted
    assert order_of(alone) == orders[0] and order_of(alone) not in orders


def checkpointed_and_plain(
    kind: str, forward: Any, recomputed: tuple[bool, ...], reentrant: bool
) -> None:
    """Compare gradients of a head whose calls are checkpointed with those of one without."""
    heads = [make_head(kind, shuffled=True, norm_images=1) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    inputs = []
    for head, checkpointed in zip(heads, (True, False), strict=True):
        head.set_iteration(3, 9)
        xs = [rois(9, seed).requires_grad_() for seed in range(len(recomputed))]

        def run(x: Tensor, head: Any = head) -> Tensor:
            with head.image_rows((4, 5)):
                return forward(head, x)

        outs = [
            checkpoint(run, x, use_reentrant=reentrant) if checkpointed and again else run(x)
            for x, again in zip(xs, recomputed, strict=True)
        ]
        sum(out.sin().sum() * (k + 1) for k, out in enumerate(outs)).backward()
        inputs.append([x.grad for x in xs])
    torch.testing.assert_close(inputs[0], inputs[1])
    torch.testing.assert_close(gradients(heads[0]), gradients(heads[1]))
    assert order_of(heads[0]) == order_of(heads[1])  # a recomputation is no call


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recomputed", [(True,), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_repeats_the_permutation(
    kind: str, recomputed: tuple[bool, ...], reentrant: bool
) -> None:
    checkpointed_and_plain(kind, call, recomputed, reentrant)


def test_two_uses_in_one_checkpointed_segment() -> None:
    checkpointed_and_plain("box", lambda head, x: head(x).sin() + head(x.flip(0)), (True,), False)
