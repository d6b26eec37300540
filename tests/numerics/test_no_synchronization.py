"""On a GPU no layer makes the host wait, and none copies its levels into one tensor."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from rethinking_bn.layers import (
    BatchNorm2d,
    BatchStatNorm2d,
    CycleBatchNorm2d,
    MultiDomainBatchNorm2d,
    SyncBatchNorm2d,
)
from tests import reference
from tests.layers.mabn.test_mabn_traps import _NoHostSynchronization
from tests.reference import CHANNELS, SHAPES


class NoWaitingNoCopy(_NoHostSynchronization):
    """Refuses what synchronises, and concatenating feature maps."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("cat", "stack") and args[0][0].dim() == 4:
            raise AssertionError("feature maps are concatenated")
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers(momentum: float | None, dtype: torch.dtype) -> None:
    layers: list[nn.Module] = [CycleBatchNorm2d(CHANNELS, len(SHAPES), momentum=momentum)]
    layers += [k(CHANNELS, momentum=momentum) for k in (BatchNorm2d, BatchStatNorm2d)]
    layers += [SyncBatchNorm2d(CHANNELS, momentum=momentum)]
    for train, population, affine in itertools.product(("shared", "domain_specific"), repeat=3):
        layers.append(
            MultiDomainBatchNorm2d(
                CHANNELS,
                len(SHAPES),
                train_stats=train,
                population_stats=population,
                affine=affine,
                momentum=momentum,
            )
        )
    xs = [x.to(dtype) for x in reference.levels()]
    xs[1] = xs[1][:0]
    with NoWaitingNoCopy():
        for layer in layers:
            for training in (True, False):
                layer.train(training)
                inputs = [x.clone().requires_grad_() for x in xs]
                several = isinstance(layer, MultiDomainBatchNorm2d)
                ys = layer(inputs) if several else [layer(x) for x in inputs]
                torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    with pytest.raises(AssertionError, match="concatenated"), NoWaitingNoCopy():
        torch.cat(xs[:1])
