"""On a GPU no layer makes the host wait, and none copies its levels into one tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rethinking_bn.layers import BatchNorm2d, MultiDomainBatchNorm2d
from rethinking_bn.numerics import running
from tests import reference
from tests.layers.kinds import kinds, run
from tests.layers.mabn.test_mabn_traps import _NoHostSynchronization


class NoWaitingNoCopy(_NoHostSynchronization):
    """Refuses what synchronises, and concatenating feature maps."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("cat", "stack") and args[0][0].dim() == 4:
            raise AssertionError("feature maps are concatenated")
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers(momentum: float | None, dtype: torch.dtype, monkeypatch: Any) -> None:
    monkeypatch.setattr(running, "host_reads", lambda x: False)  # as of a GPU's tensors
    layers = [build() for build in kinds().values()]
    xs = [x.to(dtype) for x in reference.levels()]
    xs[1] = xs[1][:0]
    with NoWaitingNoCopy():
        for layer in layers:
            for training in (True, False):
                layer.train(training).momentum = momentum
                inputs = [x.clone().requires_grad_() for x in xs]
                ys = run(layer, inputs)
                torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    with pytest.raises(AssertionError, match="concatenated"), NoWaitingNoCopy():
        torch.cat(xs[:1])


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("size", [0, 1, 2])
def test_statistics_move_alike_whether_the_host_reads_or_not(
    size: int, bad: bool, monkeypatch: Any
) -> None:
    x = torch.randn(size, 3, 1, 2 if size > 1 else 1) + 1
    if bad:
        x = x * float("inf")
    moved = []
    for reads in (True, False):
        if not reads:
            monkeypatch.setattr(running, "host_reads", lambda x: False)
        layer = MultiDomainBatchNorm2d(3, 2)
        layer.running_mean.fill_(0.5)
        layer([x, x[:0]])
        moved.append(layer.state_dict())
    assert all(torch.equal(value, moved[1][name]) for name, value in moved[0].items())
    assert moved[0]["num_batches_tracked"] == (size > 0 and not bad)
    assert bool((moved[0]["running_mean"] != 0.5).any()) == (size > 0 and not bad)
    assert bool((moved[0]["running_var"] != 1).any()) == (size > 1 and not bad)


@pytest.mark.parametrize("reads", [True, False])
def test_a_backward_after_statistics_have_moved_again(reads: bool, monkeypatch: Any) -> None:
    """The graph of torch's operator holds the statistics, which later forwards change."""
    monkeypatch.setattr(running, "host_reads", lambda x: reads)
    layer = BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), x, retain_graph=True)
    y = layer(x)
    layer(x * float("inf"))  # put back
    layer(x[:1, :, :1, :1])  # another way
    layer.reset_running_stats()
    (got,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(got, wanted)
