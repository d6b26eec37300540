"""A forward that activation checkpointing recomputes moves no statistics (defect 49)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rethinking_bn.layers import BatchNorm2d, MultiDomainBatchNorm2d
from tests import reference
from tests.layers.kinds import kinds, run
from tests.reference import CHANNELS, SHAPES

KINDS = kinds()
KINDS["BN, no affine"] = lambda: BatchNorm2d(CHANNELS, affine=False)
KINDS["row 2, cumulative"] = lambda: MultiDomainBatchNorm2d(
    CHANNELS, len(SHAPES), population_stats="domain_specific", momentum=None
)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_move_once(kind: str, reentrant: bool) -> None:
    layer = KINDS[kind]().double()
    plain = copy.deepcopy(layer)
    for seed in range(3):
        results: list[Any] = []
        for checkpointed, net in ((True, layer), (False, plain)):
            xs = [x.requires_grad_() for x in reference.levels(seed)]

            def block(*xs: Tensor, net: nn.Module = net) -> tuple[Tensor, ...]:
                return tuple(y.sigmoid() for y in run(net, list(xs)))

            ys = checkpoint(block, *xs, use_reentrant=reentrant) if checkpointed else block(*xs)
            reference.loss(ys).backward()
            results.append([ys, [x.grad for x in xs], [p.grad for p in net.parameters()]])
        torch.testing.assert_close(*results)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in layer.state_dict().items())


def test_population_training_sees_a_recomputed_forward_once() -> None:
    layer, seen = MultiDomainBatchNorm2d(CHANNELS, len(SHAPES)).double(), []
    xs = [x.requires_grad_() for x in reference.levels()]
    with layer.observing(seen.append):
        ys = checkpoint(lambda *xs: tuple(layer(list(xs))), *xs, use_reentrant=False)
        reference.loss(ys).backward()
    assert len(seen) == 1


def test_row_groups_are_recomputed_alike() -> None:
    layer, plain = (BatchNorm2d(CHANNELS) for _ in "ab")
    x = torch.randn(5, CHANNELS, 3, 3)
    for net in (layer, plain):
        leaf = x.clone().requires_grad_()
        with net.row_groups([2, 3]):
            y = checkpoint(net, leaf, use_reentrant=False) if net is layer else net(leaf)
            y.square().sum().backward()
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=0, atol=0)
