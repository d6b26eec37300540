"""Merging the ranks' population statistics: a mixture, equal on all ranks (defect 15)."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rethinking_bn.distributed import ALL_GATHER
from rethinking_bn.engine import MergeStatistics, merge_statistics
from rethinking_bn.layers import CycleBatchNorm2d, MultiDomainBatchNorm2d, SyncBatchNorm2d
from tests.helpers import run_distributed


class Twice(nn.Module):
    """Every kind of layer with statistics; one layer has two names, one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.BatchNorm2d(3)
        self.again = self.plain
        self.torch_sync = nn.SyncBatchNorm(3)
        self.sync = SyncBatchNorm2d(2)
        self.shared = MultiDomainBatchNorm2d(
            2, 3, train_stats="shared", population_stats="shared", affine="shared"
        )
        self.separate = MultiDomainBatchNorm2d(
            2,
            3,
            train_stats="domain_specific",
            population_stats="domain_specific",
            affine="domain_specific",
        )
        self.cycle = CycleBatchNorm2d(2, 3)
        self.no_statistics = nn.BatchNorm2d(2, track_running_stats=False)
        self.group = nn.GroupNorm(1, 2)
        self.frozen = nn.BatchNorm2d(2).eval()
        self.equal = nn.BatchNorm2d(5)


def fill(model: nn.Module, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            continue
        if name.startswith("equal"):
            buffer.copy_(torch.linspace(0.1, 1e8, 5))
        else:
            # means far apart, so that the variance of the means matters
            scale = 10.0 if name.endswith("running_mean") else 1.0
            buffer.copy_(torch.rand(buffer.shape, generator=generator) * scale)


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def merged_on(rank: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """Return the buffers before and after merging, and the number of collectives it took."""
    model = Twice()
    fill(model, rank)
    before = buffers(model)
    with patch.object(dist, ALL_GATHER, wraps=getattr(dist, ALL_GATHER)) as gather:
        merge_statistics(model)
    return before, buffers(model), gather.call_count


def test_every_rank_gets_the_mixture() -> None:
    world = 3
    ranks = run_distributed(merged_on, world)
    first = ranks[0][1]
    for before, after, collectives in ranks:
        assert collectives == 1
        for name, value in after.items():
            if name.startswith(("frozen", "equal")) or name.endswith("tracked"):
                assert torch.equal(value, before[name]), name
            else:
                assert torch.equal(value, first[name]), name
    checked = 0
    for name, value in first.items():
        if name.startswith(("frozen", "equal")) or "running" not in name:
            continue
        stem = name.rpartition(".")[0]
        means = [before[f"{stem}.running_mean"].double() for before, _, _ in ranks]
        mean = sum(means) / world
        if name.endswith("running_mean"):
            expected: Any = mean
        else:
            expected = sum(before[name].double() for before, _, _ in ranks) / world
            expected = expected + sum((m - mean) ** 2 for m in means) / world
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=0)
        checked += 1
    assert checked == 2 * (1 + 1 + 1 + 1 + 3 + 3)  # mean and variance; "again" is "plain"


def test_one_process_changes_nothing() -> None:
    model = Twice()
    fill(model, 0)
    before = buffers(model)
    merge_statistics(model)
    for name, value in buffers(model).items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("periods", "due"),
    [((4, 3), [3, 4, 6, 8, 9, 10]), ((4, 0), [4, 8, 10]), ((0, 0), [10]), ((20,), [10])],
)
def test_due_before_checkpoints_evaluations_and_the_end(
    periods: tuple[int, ...], due: list[int]
) -> None:
    hook = MergeStatistics(nn.BatchNorm2d(1), *periods)
    hook.trainer = type("Run", (), {"max_iter": 10})()
    assert [done for done in range(1, 11) if hook.is_due(done)] == due
