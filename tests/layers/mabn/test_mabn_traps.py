"""What went wrong in existing code for MABN, each a case here."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from rethinking_bn.layers.mabn import MABN2d
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


def test_eval_and_freeze_stop_every_update():
    model = nn.Sequential(small(), small())
    train(model, 5)
    frozen = model[0]
    assert isinstance(frozen, MABN2d)
    assert frozen.freeze(affine=True) is frozen
    before = copy.deepcopy(frozen.state_dict())
    model.eval()
    model.train()
    assert not frozen.training and model[1].training
    train(model, 3)
    torch.testing.assert_close(frozen.state_dict(), before, rtol=0, atol=0)
    assert model[1].iterations == 8
    assert not any(p.requires_grad for p in frozen.parameters())

    evaluated = small()
    train(evaluated, 3)
    before = copy.deepcopy(evaluated.state_dict())
    evaluated.eval()
    evaluated(batch(requires_grad=True)).sum().backward()
    torch.testing.assert_close(evaluated.state_dict(), before, rtol=0, atol=0)


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
