"""Synchronised layers on several processes against one process that has all the data."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rethinking_bn.distributed import ALL_GATHER
from rethinking_bn.layers import CycleBatchNorm2d, MultiDomainBatchNorm2d, SyncBatchNorm2d
from tests import reference
from tests.helpers import run_distributed
from tests.layers.kinds import ALL_EIGHT, run, with_choices
from tests.reference import CHANNELS, SHAPES

L = len(SHAPES)
BATCHES = {2: (3, 1), 3: (2, 0, 3)}  # rows of every rank; nothing on one of three


def _data(world: int) -> list[list[Tensor]]:
    """Per rank the levels it holds; the last rank of two also lacks one level."""
    ranks = [reference.levels(seed=rank, batch=n) for rank, n in enumerate(BATCHES[world])]
    ranks[-1][1] = ranks[-1][1][:0]
    return ranks


def _layer(choice: tuple[str, ...], sync: bool) -> MultiDomainBatchNorm2d:
    layer = with_choices(choice, sync=sync, dtype=torch.float64)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(torch.linspace(0.5, 1.5, CHANNELS) + 0.1 * i)
    return layer


def _run(layer: MultiDomainBatchNorm2d, xs: list[Tensor]) -> dict[str, Any]:
    xs = [x.clone().requires_grad_() for x in xs]
    ys = layer(xs)
    # a sum over elements: the one-process loss is the sum of the ranks' losses
    reference.loss(ys).backward()
    return {
        "ys": [y.detach() for y in ys],
        "dx": [x.grad for x in xs],
        "dp": {k: p.grad for k, p in layer.named_parameters()},
        "state": dict(layer.state_dict()),
    }


def _all_combinations(rank: int, world: int) -> list[dict[str, Any]]:
    return [_run(_layer(choice, sync=True), _data(world)[rank]) for choice in ALL_EIGHT]


@pytest.mark.parametrize("world", [2, 3])
def test_sync_equals_one_process_on_all_data(world: int) -> None:
    per_rank = run_distributed(_all_combinations, world, world)
    data = _data(world)
    for index, choice in enumerate(ALL_EIGHT):
        one = _run(
            _layer(choice, sync=False), [torch.cat(level) for level in zip(*data, strict=True)]
        )
        ranks = [results[index] for results in per_rank]
        for level in range(L):
            for key in ("ys", "dx"):
                got = torch.cat([rank[key][level] for rank in ranks])
                torch.testing.assert_close(got, one[key][level], rtol=1e-9, atol=1e-9)
        for name, gradient in one["dp"].items():
            torch.testing.assert_close(sum(rank["dp"][name] for rank in ranks), gradient)
        for rank in ranks:
            torch.testing.assert_close(rank["state"], one["state"])
            for name, value in rank["state"].items():
                assert torch.equal(value, ranks[0]["state"][name])  # bit for bit


def _count_collectives(rank: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name in (ALL_GATHER, "all_reduce", "all_gather", "broadcast"):
        original = getattr(dist, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            counts[_name] += 1
            return _original(*args, **kwargs)

        setattr(dist, name, counted)
    _run(_layer(("shared", "domain_specific", "shared"), sync=True), _data(2)[rank])
    return counts


def test_one_collective_a_layer_and_direction() -> None:
    for counts in run_distributed(_count_collectives, 2):
        assert counts == {ALL_GATHER: 1, "all_reduce": 1}


def _sync_batch_norm(rank: int, rows: tuple[int, ...]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    everything = torch.randn(sum(rows), CHANNELS, 3, 2, generator=generator) * 2 + 1
    x = everything.split(list(rows))[rank].clone().requires_grad_()
    layer = SyncBatchNorm2d(CHANNELS)
    y = layer(x)
    reference.loss([y]).backward()
    return {"y": y.detach(), "dx": x.grad, "state": dict(layer.state_dict()), "all": everything}


@pytest.mark.parametrize("rows", [(3, 0), (0, 0), (2, 0, 5)])
def test_sync_batch_norm_bears_empty_ranks(rows: tuple[int, ...]) -> None:
    """Defect 11: torch's refuses CPU tensors in a group, and is NaN when every rank is empty."""
    ranks = run_distributed(_sync_batch_norm, len(rows), rows)
    for rank in ranks:
        assert all(torch.isfinite(v).all() for v in rank["state"].values())
    if not sum(rows):
        assert torch.equal(ranks[0]["state"]["running_var"], torch.ones(CHANNELS))
        return
    x = ranks[0]["all"].requires_grad_()
    layer = torch.nn.BatchNorm2d(CHANNELS)
    y = layer(x)
    reference.loss([y]).backward()
    torch.testing.assert_close(torch.cat([r["y"] for r in ranks]), y.detach())
    torch.testing.assert_close(torch.cat([r["dx"] for r in ranks]), x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ranks[-1]["state"], dict(layer.state_dict()))


def _expanded_gradient(rank: int) -> Tensor:
    layer = SyncBatchNorm2d(CHANNELS)
    x = torch.randn(2, CHANNELS, 2, 2, requires_grad=True)
    layer(x).sum(0).sum().backward()
    assert x.grad is not None
    return x.grad


def test_an_expanded_gradient_survives_the_collective() -> None:
    """Defect 14: reducing an expanded incoming gradient in place corrupts memory."""
    for gradient in run_distributed(_expanded_gradient, 2):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


def _cycle(rank: int) -> dict[str, Tensor]:
    layer = CycleBatchNorm2d(CHANNELS, L, sync=True, dtype=torch.float64)
    run(layer, _data(2)[rank])
    return dict(layer.state_dict())


def test_synced_cycle_equals_the_multi_domain_layer() -> None:
    one = _layer(("domain_specific", "domain_specific", "shared"), sync=False)
    one([torch.cat(level) for level in zip(*_data(2), strict=True)])
    for state in run_distributed(_cycle, 2):
        for key, value in state.items():
            if "running" in key:
                torch.testing.assert_close(value, one.state_dict()[key])


def _nothing_needs_a_gradient_on_rank_1(rank: int) -> tuple[list[Any], bool]:
    layers: list[Any] = [
        SyncBatchNorm2d(CHANNELS, affine=False, dtype=torch.float64),
        MultiDomainBatchNorm2d(CHANNELS, L, sync=True, dtype=torch.float64).requires_grad_(False),
        CycleBatchNorm2d(CHANNELS, L, sync=True, dtype=torch.float64).requires_grad_(False),
    ]
    gradients = []
    for layer in layers:
        xs = [x.requires_grad_(rank == 0) for x in reference.levels(seed=rank)]
        ys = run(layer, xs)
        reference.loss(ys).backward()
        gradients.append([x.grad for x in xs])
    return gradients, all(y.requires_grad for y in ys)


def test_a_rank_without_need_of_a_gradient_reaches_the_backward_s_collective() -> None:
    """Its layer's input and affine need none while the other rank's input does (defect 26)."""
    (gradients, _), (nothing, in_graph) = run_distributed(
        _nothing_needs_a_gradient_on_rank_1, 2, timeout=30
    )
    assert in_graph
    assert all(gradient is None for of_layer in nothing for gradient in of_layer)
    ranks = [reference.levels(seed=rank) for rank in range(2)]
    own = [x.requires_grad_() for x in ranks[0]]
    one, zero = (torch.full((CHANNELS,), value, dtype=torch.float64) for value in (1.0, 0.0))
    each = [[levels[i] for levels in ranks] for i in range(L)]
    for of_layer, pools in zip(gradients, (each, [sum(ranks, [])] * L, each), strict=True):
        loss = sum(
            reference.loss(
                [reference.normalize([x], pools[i], one, zero)[0] for i, x in enumerate(levels)]
            )
            for levels in ranks
        )
        torch.testing.assert_close(of_layer, list(torch.autograd.grad(loss, own)))
