"""torchvision's Mask R-CNN with heads whose RoIs are shuffled over all ranks."""

from __future__ import annotations

from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

from rethinking_bn.layers import BatchNorm2d, shuffle_rows
from rethinking_bn.randomness import announce_iteration, derive_seed
from rethinking_bn.shuffle import exchange as row_exchange
from rethinking_bn.torchvision import ShuffleBNBoxHead, ShuffleBNMaskHead
from tests.helpers import run_distributed
from tests.reference import ema, normalize
from tests.torchvision_cases import batch, mask_rcnn

KINDS = ("box", "mask")
CHANNELS, SIDE = 4, 3
RUN_SEED, ITERATION = 5, 8


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


def rois(count: int, seed: int = 0) -> Tensor:
    """Return RoI features whose statistics drift from row to row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, CHANNELS, SIDE, SIDE, generator=generator, dtype=torch.float64)
    row = torch.arange(count, dtype=torch.float64)[:, None, None, None]
    return x * (1 + row / 4) + row


def loss(out: Tensor, first: int = 0) -> Tensor:
    """A loss that depends on which of all rows an output row is."""
    row = torch.arange(first, first + len(out), dtype=torch.float64)
    return (out.flatten(1).sin() * (1 + row[:, None])).sum()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def running(head: Any) -> list[tuple[Tensor, Tensor]]:
    return [(block[1].running_mean, block[1].running_var) for block in (head[0], head[1])]


def record_orders(head: Any) -> list[Tensor]:
    """Return a list to which each forward adds the first value of every row, as normalised."""
    orders: list[Tensor] = []
    conv = head[0][0]
    conv.register_forward_pre_hook(lambda _, args: orders.append(args[0][:, 0, 0, 0].clone()))
    return orders


def permutation(head: Any, rows: int, run_seed: int, iteration: int, call: int = 0) -> Tensor:
    """Return the row in each slot of a head's shuffle; not within a process group."""
    seed = derive_seed(run_seed, iteration, head.seed_of_head, call)
    return shuffle_rows(torch.arange(rows), generator_seed=seed)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_in_one_process_it_is_torchvisions_head(kind: str) -> None:
    """The statistics of permuted rows are those of the rows."""
    ours, theirs = make_head(kind), make_head(kind, nn.BatchNorm2d, shuffled=False)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours[0][0].weight, theirs[0][0].weight)
    orders = record_orders(ours)
    x, y = (rois(9).requires_grad_() for _ in range(2))
    out, expected = ours(x), theirs(y)
    assert not torch.equal(orders[0], x[:, 0, 0, 0])
    assert torch.equal(orders[0].sort().values, x[:, 0, 0, 0].sort().values)
    torch.testing.assert_close(out, expected)
    loss(out).backward()
    loss(expected).backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(gradients(ours), gradients(theirs))
    torch.testing.assert_close(running(ours), running(theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_at_inference_it_is_the_unshuffled_head_with_the_same_checkpoint(kind: str) -> None:
    ours, theirs = make_head(kind), make_head(kind, BatchNorm2d, shuffled=False)
    ours(rois(7))
    theirs.load_state_dict(ours.state_dict())
    orders, x = record_orders(ours), rois(5, seed=3)
    for rows in (x, x[:0]):
        assert torch.equal(ours.eval()(rows), theirs.eval()(rows))
        assert torch.equal(orders.pop(), rows[:, 0, 0, 0])
    ours.load_state_dict(make_head(kind, nn.BatchNorm2d, shuffled=False).state_dict())


@pytest.mark.parametrize("norm", ["bn", "MABN"])
def test_a_norm_that_does_not_fit_is_an_error(norm: str) -> None:
    for kind in KINDS:
        with pytest.raises(ValueError, match=norm):
            make_head(kind, norm)


ROWS = [(4, 5), (0, 3), (0, 0), (6, 1)]
CASES = [
    (kind, options, rows)
    for kind, options in (
        ("box", {}),
        ("box", {"fc_layers": []}),
        ("box", {"fc_layers": [100, 5]}),
        ("mask", {}),
        ("mask", {"dilation": 2}),
    )
    for rows in ROWS
]


def shares(total: int) -> list[int]:
    return [total // 2, total - total // 2]


def _run_cases(rank: int) -> list[dict[str, Any]]:
    results = []
    for kind, options, rows in CASES:
        head = make_head(kind, **options)
        announce_iteration(head, RUN_SEED, ITERATION)
        first = sum(rows[:rank])
        x = rois(sum(rows))[first : first + rows[rank]].clone().requires_grad_()
        with mock.patch.object(
            row_exchange, "all_to_all_rows", wraps=row_exchange.all_to_all_rows
        ) as exchange:
            out = head(x)
            loss(out, first).backward()
        sent = [(len(packed), packed.nbytes) for _, (_, packed, *_), _ in exchange.mock_calls]
        results.append(
            {
                "out": out.detach(),
                "grad": x.grad,
                "gradients": gradients(head),
                "running": running(head),
                "sent": sent,
            }
        )
    return results


@cache
def two_processes() -> list[list[dict[str, Any]]]:
    return run_distributed(_run_cases, 2)


def written_out(head: Any, x: Tensor, sizes: list[int]) -> tuple[Tensor, list[list[Any]]]:
    """Return the output with each share of the rows normalised by itself, and the running
    statistics of each share and layer after one step from mean 0 and variance 1."""
    statistics: list[list[Any]] = [[] for _ in sizes]
    for conv, norm, _ in (head[0], head[1]):
        x = F.conv2d(x, conv.weight, padding=conv.padding, dilation=conv.dilation)
        zero, one = torch.zeros(x.shape[1]).double(), torch.ones(x.shape[1]).double()
        parts = x.split(sizes)
        for of_rank, part in zip(statistics, parts, strict=True):
            of_rank.append(ema(zero, one, [part]))
        x = torch.cat(
            [normalize([p], [p], norm.weight, norm.bias)[0] if len(p) else p for p in parts]
        ).relu()
    if isinstance(head, FastRCNNConvFCHead):
        x = x.flatten(1)
        for layer in head:
            if isinstance(layer, nn.Linear):
                x = F.relu(F.linear(x, layer.weight, layer.bias))
    return x, statistics


@pytest.mark.parametrize("number", range(len(CASES)))
def test_two_processes_equal_one_that_normalises_the_same_shares(number: int) -> None:
    kind, options, rows = CASES[number]
    head, total = make_head(kind, nn.BatchNorm2d, shuffled=False, **options), sum(rows)
    order = permutation(make_head(kind), total, RUN_SEED, ITERATION)
    x = rois(total).requires_grad_()
    shuffled, statistics = written_out(head, x[order], shares(total))
    out = shuffled[order.argsort()]
    loss(out).backward()
    ranks = [of_rank[number] for of_rank in two_processes()]
    torch.testing.assert_close(torch.cat([rank["out"] for rank in ranks]), out)
    torch.testing.assert_close(torch.cat([rank["grad"] for rank in ranks]), x.grad)
    for name, gradient in gradients(head).items():
        summed = sum(rank["gradients"][name] for rank in ranks)
        torch.testing.assert_close(summed, gradient)
    for rank, expected in zip(ranks, statistics, strict=True):
        torch.testing.assert_close(rank["running"], expected)


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
