"""What went wrong in existing code for MABN, and population training of it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from rethinking_bn.layers.mabn import CenConv2d, MABN2d
from rethinking_bn.numerics.moments import Moments
from rethinking_bn.population import estimate_population_statistics
from tests.helpers import run_distributed
from tests.layers.mabn.reference import Reference

C = 3
OPTIONS: dict[str, Any] = {"warmup_iters": 3, "correction_start": 5, "r_max": 1.05}


def small(m: int = 2, **options: Any) -> MABN2d:
    return MABN2d(C, simulated_batch_size=2 * m, batch_size=2, **{**OPTIONS, **options})


def batch(scale: float = 1.0, **options: Any) -> Tensor:
    return torch.randn(2, C, 4, 3, **options) * scale


def train(layer: nn.Module, iterations: int, seed: int = 0) -> list[Tensor]:
    """Run training iterations; return their outputs and input gradients."""
    generator = torch.Generator().manual_seed(seed)
    results = []
    for t in range(iterations):
        x = torch.randn(2, C, 4, 3, generator=generator).mul(1 + t % 3).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        assert x.grad is not None
        results += [y.detach(), x.grad]
    return results


@pytest.mark.parametrize("uses", [2, 5])
def test_several_uses_in_one_forward(uses):
    """Every call is an iteration: forwards in the order of calls, backwards in theirs."""
    layer = small(3).double()
    reference = Reference(3, OPTIONS["warmup_iters"], OPTIONS["correction_start"], r_max=1.05)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    for _ in range(6):
        xs = [batch(1 + k, dtype=torch.float64).requires_grad_() for k in range(uses)]
        dys = [torch.randn_like(x) for x in xs]
        # chained, so that the order of the backwards is known: last use first
        total, calls = torch.zeros((), dtype=torch.float64), []
        for x, dy in zip(xs, dys, strict=True):
            y = layer(x + 0 * total)
            torch.testing.assert_close(y, reference.forward(x.detach(), weight, bias))
            calls.append(copy.copy(reference))
            total = total * 0 + (y * dy).sum() + total
        grads = torch.autograd.grad(total, xs)
        for x_grad, call, dy in reversed(list(zip(grads, calls, dys, strict=True))):
            torch.testing.assert_close(x_grad, call.backward(dy)[0])
    assert layer.iterations == 6 * uses and layer.gradient_ring.pushed == 6 * uses


def test_forwards_without_a_backward():
    """They move the forward statistics, as BatchNorm's, and leave the gradients' alone."""
    layer = small(2)
    train(layer, 4)
    before = layer.gradient_ring.values.clone()
    with torch.no_grad():
        layer(batch(3.0))
    with torch.inference_mode():
        layer(batch(3.0))
    layer(batch(3.0, requires_grad=True))  # its graph is never used
    assert layer.iterations == 7 and layer.gradient_ring.pushed == 4
    assert torch.equal(layer.gradient_ring.values, before)
    train(layer, 2)
    assert layer.iterations == 9 and layer.gradient_ring.pushed == 6


def test_first_forward_in_inference_mode():
    layer = MABN2d(C, simulated_batch_size=4)
    with torch.inference_mode():
        layer(batch())
    train(layer, 3)
    assert layer.iterations == 4


@pytest.mark.parametrize("iterations", [0, 6])
@pytest.mark.parametrize("shape", [(0, C, 4, 3), (2, C, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_empty_input(iterations, shape, dtype):
    """Comes back empty with a graph to it and to the parameters; the state stays."""
    layer = small()
    train(layer, iterations)
    layer.zero_grad()
    before = copy.deepcopy(layer.state_dict())
    x = torch.empty(shape, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.shape == shape and y.dtype == dtype
    y.sum().backward()
    for tensor in (x, layer.weight, layer.bias):
        assert tensor.grad is not None and torch.equal(tensor.grad, torch.zeros_like(tensor))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert layer.iterations == iterations
    assert layer.eval()(x).shape == shape


class _NoHostSynchronization(TorchDispatchMode):
    """Refuses the operators that make the host wait for a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"):
            raise AssertionError(f"{name} synchronises")
        return func(*args, **(kwargs or {}))


def test_no_host_synchronization():
    layer = small()
    with _NoHostSynchronization():
        for k in range(8):
            x = batch(1 + k).requires_grad_()
            for reentrant in (True, False):
                y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
                y.sum().backward()
    with pytest.raises(AssertionError, match="synchronises"), _NoHostSynchronization():
        torch.ones(()).item()


def test_overflow_does_not_stay():
    """One step of infinite activations or gradients leaves finite statistics behind."""
    layer = small(3)
    train(layer, 7)
    x = batch()
    x[0, 0, 0, 0] = float("inf")
    before = layer.running_mean_square.clone()
    layer(x.requires_grad_()).sum().backward()
    dy = torch.full((2, C, 4, 3), float("nan"))
    layer(batch(requires_grad=True)).backward(dy)
    assert all(buffer.isfinite().all() for buffer in layer.buffers())
    assert not torch.equal(layer.running_mean_square[1:], before[1:])  # channels without overflow
    assert all(result.isfinite().all() for result in train(layer, 1))


@pytest.mark.parametrize("iterations", [1, 4, 9])
def test_resume_is_exact(iterations):
    straight = small(3)
    train(straight, iterations)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    for resumed in (small(3), MABN2d(C, simulated_batch_size=6, **OPTIONS)):
        resumed.load_state_dict(torch.load(file))
        file.seek(0)
        copied = copy.deepcopy(straight)
        expected = train(copied, 8, seed=1)
        for got, want in zip(train(resumed, 8, seed=1), expected, strict=True):
            assert torch.equal(got, want)
        torch.testing.assert_close(resumed.state_dict(), copied.state_dict(), rtol=0, atol=0)
        assert resumed.iterations == iterations + 8


def test_deepcopy_is_independent():
    layer = small()
    train(layer, 5)
    copied = copy.deepcopy(layer)
    before = copy.deepcopy(layer.state_dict())
    train(copied, 3)
    assert copied.iterations == 8 and layer.iterations == 5
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    y = layer(batch(requires_grad=True))
    again = copy.deepcopy(layer)  # with a graph alive
    y.sum().backward()
    assert again.gradient_ring.pushed == 5


def test_evaluation_stops_every_update():
    layer = small()
    train(layer, 3)
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    layer(batch(requires_grad=True)).sum().backward()
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_resetting():
    layer = small()
    train(layer, 6)
    kept = layer.running_mean_square.clone()
    layer.restart_warmup()
    assert layer.iterations == 0 and torch.equal(layer.running_mean_square, kept)
    train(layer, 1)
    layer.reset_running_stats()
    torch.testing.assert_close(dict(layer.named_buffers()), dict(small().named_buffers()))


def test_data_parallel_replicas_are_refused():
    replica = small()._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="one process per GPU"):
        replica(batch())


def _ddp_steps(rank: int, broadcast: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(C, C, 1), layer := small(), layer)
    ddp = DistributedDataParallel(model, broadcast_buffers=broadcast)
    torch.manual_seed(1 + rank)
    for t in range(7):
        shape = (0, C, 4, 3) if t == 3 and rank == 1 else (2, C, 4, 3)
        ddp(torch.randn(shape) * (1 + rank)).square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None], model.state_dict()


@pytest.mark.parametrize("broadcast", [False, True])
def test_distributed_data_parallel(broadcast):
    """Gradients agree on all ranks, an empty one included; statistics are each rank's own."""
    (grads0, state0), (grads1, state1) = run_distributed(_ddp_steps, 2, broadcast)
    assert len(grads0) == 4
    torch.testing.assert_close(grads0, grads1, rtol=0, atol=0)
    assert all(value.isfinite().all() for value in state0.values())
    assert not torch.equal(state0["1.running_mean_square"], state1["1.running_mean_square"])


def layer(**options: Any) -> MABN2d:
    return MABN2d(C, simulated_batch_size=4, batch_size=2, warmup_iters=2, **options).double()


def unequal_batches(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1 + i % 3, C, 2 + i, 3, generator=generator, dtype=torch.float64) * (1 + i)
        for i in range(count)
    ]


def mean_square(xs: list[Tensor]) -> Tensor:
    return torch.cat([x.square().transpose(0, 1).flatten(1) for x in xs], dim=1).mean(1)


def test_observed_forwards_change_nothing():
    norm = layer()
    for x in unequal_batches(5):
        norm(x.requires_grad_()).sum().backward()
    before = copy.deepcopy(norm.state_dict())
    seen: list[Moments] = []
    x = unequal_batches(3)[2].requires_grad_()
    with norm.observing(seen.append):
        y = norm(x)
        y.square().sum().backward()
        norm(x[:0])
        norm([x, x[:, :, :1]])
        norm.eval()(x)
        norm.train()
    rms = (mean_square([x]) + norm.eps).sqrt().view(1, -1, 1, 1)
    torch.testing.assert_close(y, x / rms)  # by its own mean square, r = 1
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
    assert norm.iterations == 5 and len(seen) == 3
    assert [m.count.tolist() for m in seen] == [[36.0], [0.0], [45.0]]
    torch.testing.assert_close(seen[0].mean[0], mean_square([x]))
    torch.testing.assert_close(seen[2].mean[0], mean_square([x, x[:, :, :1]]))
    assert all(m.mean.shape == m.m2.shape == (1, C) and not m.m2.any() for m in seen)


def test_estimate():
    """Pooled over unequal batches and both uses; deeper layers see mini-batch normalised input."""
    torch.manual_seed(0)
    shared, last, unused = layer(), layer(), layer()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = CenConv2d(C, C, 1, bias=False).double()
            self.shared, self.last, self.unused = shared, last, unused

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.last(self.shared(x) + self.shared(2 * x))

    model = Model()
    batches = unequal_batches(6)
    estimate_population_statistics(model, batches, 6, labelled=True, progress=False)
    features = [model.conv(x) for x in batches]
    torch.testing.assert_close(
        shared.running_mean_square, mean_square([f for x in features for f in (x, 2 * x)])
    )

    def normalized(x: Tensor) -> Tensor:
        return x / (mean_square([x]) + 1e-5).sqrt().view(1, -1, 1, 1)

    seen = [normalized(x) + normalized(2 * x) for x in features]
    torch.testing.assert_close(last.running_mean_square, mean_square(seen))
    assert torch.equal(unused.running_mean_square, torch.ones(C, dtype=torch.float64))
    assert shared.iterations == last.iterations == 0


def _estimate(rank: int) -> Tensor:
    norm = layer()
    for x in unequal_batches(4, seed=rank):  # ranks that differ
        norm(x)
    batches = unequal_batches(6)[rank::2]
    estimate_population_statistics(norm, batches, 3, labelled=True, progress=False)
    return norm.running_mean_square


def test_ranks_end_with_the_same_statistics():
    a, b = run_distributed(_estimate, 2)
    assert torch.equal(a, b)
    torch.testing.assert_close(a, mean_square(unequal_batches(6)))
