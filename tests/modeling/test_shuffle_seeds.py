"""Which permutation a shuffle head draws, and that a recomputation draws it again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rethinking_bn.randomness import announce_iteration
from tests.modeling.roi_cases import call, gradients, make_head, order_of, rois


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


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recomputed", [(True,), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_activation_checkpointing_repeats_the_permutation(
    kind: str, recomputed: tuple[bool, ...], reentrant: bool
) -> None:
    heads = [make_head(kind, shuffled=True, norm_images=1) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    inputs = []
    for head, checkpointed in zip(heads, (True, False), strict=True):
        head.set_iteration(3, 9)
        xs = [rois(9, seed).requires_grad_() for seed in range(len(recomputed))]

        def run(x: Tensor, head: Any = head) -> Tensor:
            with head.image_rows((4, 5)):
                return call(head, x)

        outs = [
            checkpoint(run, x, use_reentrant=reentrant) if checkpointed and again else run(x)
            for x, again in zip(xs, recomputed, strict=True)
        ]
        sum(out.sin().sum() * (k + 1) for k, out in enumerate(outs)).backward()
        inputs.append([x.grad for x in xs])
    torch.testing.assert_close(inputs[0], inputs[1])
    torch.testing.assert_close(gradients(heads[0]), gradients(heads[1]))
    assert order_of(heads[0]) == order_of(heads[1])  # a recomputation is no call


def test_two_uses_in_one_checkpointed_segment() -> None:
    heads = [make_head("box", shuffled=True, norm_images=1) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    results = []
    for head, checkpointed in zip(heads, (True, False), strict=True):
        head.set_iteration(3, 9)
        x = rois(9).requires_grad_()

        def run(x: Tensor, head: Any = head) -> Tensor:
            with head.image_rows((4, 5)):
                return head(x).sin() + head(x.flip(0)).cos()

        out = checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
        out.sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results)
