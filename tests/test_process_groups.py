"""A process group other than the default one: only its ranks pool, estimate and wait."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rethinking_bn.distributed import (
    all_gather,
    data_parallel,
    gather_numbers,
    host_group,
    raise_together,
)
from rethinking_bn.engine import merge_statistics
from rethinking_bn.layers import MultiDomainBatchNorm2d, SyncBatchNorm2d
from rethinking_bn.population import estimate_population_statistics
from rethinking_bn.shuffle.rows import _agree
from tests import reference
from tests.helpers import run_distributed
from tests.reference import CHANNELS, SHAPES

GROUPS = ((0, 1), (2,))


def levels(rank: int, step: int) -> list[Tensor]:
    """Rank 1 lacks a level."""
    xs = reference.levels(seed=10 * rank + step, batch=1 + rank)
    return [x[: 0 if rank == 1 and i == 2 else None] for i, x in enumerate(xs)]


def together(ranks: tuple[int, ...], step: int) -> list[Tensor]:
    return [torch.cat(level) for level in zip(*(levels(r, step) for r in ranks), strict=True)]


def layer(group: Any = None, **options: Any) -> MultiDomainBatchNorm2d:
    options |= {"population_stats": "domain_specific", "momentum": None, "process_group": group}
    return MultiDomainBatchNorm2d(CHANNELS, len(SHAPES), dtype=torch.float64, **options)


def single(group: Any = None) -> nn.Module:
    return nn.Sequential(SyncBatchNorm2d(CHANNELS, process_group=group, dtype=torch.float64))


def train(norm: MultiDomainBatchNorm2d, batches: list[list[Tensor]]) -> dict[str, Any]:
    for xs in batches:
        inputs = [x.clone().requires_grad_() for x in xs]
        reference.loss(norm(inputs)).backward()
    return {"dx": [x.grad for x in inputs], "state": dict(norm.state_dict())}


def on_rank(rank: int) -> dict[str, Any]:
    groups = [dist.new_group(list(ranks)) for ranks in GROUPS]  # every rank makes all of them
    group = groups[0 if rank in GROUPS[0] else 1]
    found = train(layer(group, sync=True), [levels(rank, step) for step in range(3)])
    model = single(group)
    report = estimate_population_statistics(
        model, [levels(rank, step)[0] for step in range(2 + rank // 2)], 2 + rank // 2, group=group
    )
    found["population"], found["world"] = dict(model.state_dict()), report.world_size
    plain = nn.BatchNorm1d(1)
    plain.running_mean.fill_(rank)
    merge_statistics(plain, group)
    found["merged"] = plain.running_mean.item(), plain.running_var.item()
    outside = groups[1 if rank in GROUPS[0] else 0]
    with pytest.raises(ValueError, match="not a member"):
        layer(outside, sync=True)(levels(rank, 0))
    with pytest.raises(ValueError, match="not a member"):
        estimate_population_statistics(single(outside), [levels(rank, 0)[0]], 1, group=outside)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(on_rank, 3)


@pytest.mark.parametrize("members", GROUPS)
def test_only_the_ranks_of_the_group_take_part(
    ranks: list[dict[str, Any]], members: tuple[int, ...]
) -> None:
    expected = train(layer(), [together(members, step) for step in range(3)])
    for level, gradient in enumerate(expected["dx"]):
        got = torch.cat([ranks[rank]["dx"][level] for rank in members])
        torch.testing.assert_close(got, gradient)
    model, steps = single(), 2 + members[0] // 2  # the groups take different numbers of batches
    estimate_population_statistics(model, [together(members, s)[0] for s in range(steps)], steps)
    for rank in members:
        torch.testing.assert_close(ranks[rank]["state"], expected["state"])
        torch.testing.assert_close(ranks[rank]["population"], dict(model.state_dict()))
        assert ranks[rank]["world"] == len(members)
        assert ranks[rank]["merged"] == ((0.5, 1.25) if len(members) == 2 else (2.0, 1.0))


def _over_the_host(rank: int) -> Any:
    # takes no CPU tensors, as an NCCL group
    group = dist.new_group([0, 1], backend="cuda:gloo")
    assert host_group() is None  # gloo itself
    if rank == 2:
        return None
    with pytest.raises(RuntimeError, match="[Bb]ackend"):
        all_gather(torch.zeros(1), group)
    assert host_group(group) is host_group(group) is not group
    rows, _, _ = _agree(torch.zeros(rank + 1, 2), 5, group)  # a shuffle's header
    with pytest.raises(RuntimeError if rank else KeyError, match="lost"):
        raise_together(None if rank else KeyError("lost"), group)
    with pytest.raises(ValueError, match="dtype is torch.float32 on rank 0 and"):
        _agree(torch.zeros(1, 2, dtype=torch.float64 if rank else torch.float32), 5, group)
    return gather_numbers([rank, -(2**62) + rank], group), rows


def test_what_the_host_must_know_travels_beside_a_group_of_devices() -> None:
    """On the ranks of the group alone, created on first use and once."""
    low = -(2**62)
    told = ([[0, low], [1, low + 1]], [1, 2])
    assert run_distributed(_over_the_host, 3) == [told, told, None]


def _wrap(rank: int) -> tuple[Tensor, Tensor, float]:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1 + rank)
    model[1].running_mean.fill_(rank)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped = data_parallel(model)
    at_first = model[1].running_mean.clone()
    wrapped(torch.randn(3, 2)).sum().backward()
    return at_first, model[1].running_mean, float(model[0].weight.detach().mean())


def test_data_parallel_leaves_buffers_to_the_ranks_without_a_warning() -> None:
    """Neither at the start nor in a forward; parameters are rank 0's."""
    for rank, (at_first, later, weight) in enumerate(run_distributed(_wrap, 2)):
        assert at_first.tolist() == later.tolist() == [rank] * 2 and weight == 1
