"""torchvision's Mask R-CNN with heads whose RoIs are shuffled over all ranks."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

from rethinking_bn.layers import BatchNorm2d
from rethinking_bn.randomness import announce_iteration
from rethinking_bn.torchvision import ShuffleBNBoxHead, ShuffleBNMaskHead
from tests import rois
from tests.helpers import run_distributed
from tests.rois import CHANNELS, SIDE, gradients, loss, permutation, record_orders, running, shares
from tests.torchvision_cases import batch, mask_rcnn

RUN_SEED, ITERATION = 5, 8
kinds = pytest.mark.parametrize("kind", ["box", "mask"])


def make_head(kind: str, norm_layer: Any = "BN", *, shuffled: bool = True, **options: Any) -> Any:
    """Return a small head with random affines; float64, training mode, always the same weights."""
    torch.manual_seed(2)
    if kind == "box":
        box = ShuffleBNBoxHead if shuffled else FastRCNNConvFCHead
        fc_layers = options.get("fc_layers", [6])
        head = box((CHANNELS, SIDE, SIDE), [4, 8], fc_layers, norm_layer=norm_layer)
    else:
        mask = ShuffleBNMaskHead if shuffled else MaskRCNNHeads
        head = mask(CHANNELS, [4, 8], options.get("dilation", 1), norm_layer=norm_layer)
    for parameter in head.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return head.double()


@kinds
def test_permuted_in_one_process_it_is_torchvisions_head(kind: str) -> None:
    """The statistics of permuted rows are those of the rows."""
    ours, theirs = make_head(kind), make_head(kind, nn.BatchNorm2d, shuffled=False)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours[0][0].weight, theirs[0][0].weight)
    orders = record_orders(ours)
    x, y = (rois.rois(9).requires_grad_() for _ in range(2))
    out, expected = ours(x), theirs(y)
    assert not torch.equal(orders[0], x[:, 0, 0, 0])
    assert torch.equal(orders[0].sort().values, x[:, 0, 0, 0].sort().values)
    torch.testing.assert_close(out, expected)
    (loss(out) + loss(expected)).backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(gradients(ours), gradients(theirs))
    torch.testing.assert_close(running(ours), running(theirs))


@kinds
def test_at_inference_it_is_the_unshuffled_head_with_the_same_checkpoint(kind: str) -> None:
    ours, theirs = make_head(kind), make_head(kind, BatchNorm2d, shuffled=False)
    ours(rois.rois(7))
    theirs.load_state_dict(ours.state_dict())
    orders, x = record_orders(ours), rois.rois(5, seed=3)
    for rows in (x, x[:0]):
        assert torch.equal(ours.eval()(rows), theirs.eval()(rows))
        assert torch.equal(orders.pop(), rows[:, 0, 0, 0])
    ours.load_state_dict(make_head(kind, nn.BatchNorm2d, shuffled=False).state_dict())


@kinds
@pytest.mark.parametrize("norm", ["bn", "MABN"])
def test_a_norm_that_does_not_fit_is_an_error(norm: str, kind: str) -> None:
    with pytest.raises(ValueError, match=norm):
        make_head(kind, norm)


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("box", {}),
    ("box", {"fc_layers": []}),
    ("box", {"fc_layers": [100, 5]}),
    ("mask", {}),
    ("mask", {"dilation": 2}),
]
CASES = [(*kind, rows) for kind in KINDS for rows in [(4, 5), (0, 3), (0, 0), (6, 1)]]


def _run_cases(rank: int) -> list[dict[str, Any]]:
    results = []
    for kind, options, rows in CASES:
        head = make_head(kind, **options)
        announce_iteration(head, RUN_SEED, ITERATION)
        results.append(rois.on_rank(head, head, rows, rank))
    return results


@cache
def two_processes() -> list[list[dict[str, Any]]]:
    return run_distributed(_run_cases, 2)


def written_out(head: Any, x: Tensor, sizes: Any) -> Tensor:
    x, _ = rois.written_out(head, x, sizes)
    if isinstance(head, FastRCNNConvFCHead):
        x = x.flatten(1)
        for layer in head:
            x = layer(x).relu() if isinstance(layer, nn.Linear) else x
    return x


@pytest.mark.parametrize("number", range(len(CASES)))
def test_two_processes_equal_one_that_normalises_the_same_shares(number: int) -> None:
    kind, options, rows = CASES[number]
    head, total = make_head(kind, nn.BatchNorm2d, shuffled=False, **options), sum(rows)
    order = permutation(make_head(kind), total, RUN_SEED, ITERATION)
    ranks = [of_rank[number] for of_rank in two_processes()]
    groups = [[share] for share in shares(total, 2)]
    rois.assert_equals_one_process(ranks, head, partial(written_out, head), order, groups)


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "", partial(nn.GroupNorm, 4)])
def test_in_torchvisions_mask_rcnn(norm: Any) -> None:
    model = mask_rcnn(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for iteration in range(2):
        announce_iteration(model, 0, iteration)
        optimizer.zero_grad()
        losses = model(*batch(iteration))
        sum(losses.values()).backward()
        assert "loss_mask" in losses and all(v.isfinite() for v in losses.values())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    detections = model.eval()(batch(3)[0])
    assert all(len(d["masks"]) and d["masks"].isfinite().all() for d in detections)
