"""Checkpoints of MABN2d between different ring lengths, and without rings."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rethinking_bn.layers.mabn import MABN2d
from rethinking_bn.layers.ring import ValueRing

C = 3


def ring(length: int, values: list[float]) -> ValueRing:
    made = ValueRing(1)
    made.set_length(length, torch.zeros(1))
    for value in values:
        made.push(torch.tensor([value]))
    return made


def trained(m: int, iterations: int) -> MABN2d:
    layer = MABN2d(C, simulated_batch_size=2 * m, batch_size=2, warmup_iters=2, correction_start=4)
    for t in range(iterations):
        layer(torch.randn(2, C, 3, 3, requires_grad=True) * (t + 1)).sum().backward()
    return layer


@pytest.mark.parametrize("pushed", range(9))
def test_ring_is_the_mean_of_the_last_values(pushed):
    values = [float(2**i) for i in range(pushed)]
    made = ring(3, values)
    assert made.count.item() == made.pushed == pushed
    expected = sum(values[-3:]) / max(1, len(values[-3:]))
    torch.testing.assert_close(made.mean(), torch.tensor([expected]))


@pytest.mark.parametrize("pushed", range(12))
def test_a_longer_ring_continues_the_average(pushed):
    values = [float(i + 1) for i in range(pushed)]
    short, long = ring(3, values), ring(5, [])
    assert long.load_state_dict(short.state_dict()) == nn.modules.module._IncompatibleKeys([], [])
    assert long.pushed == pushed
    torch.testing.assert_close(long.mean(), short.mean())
    for i in range(4):
        long.push(torch.tensor([100.0 + i]))
    # the oldest of the five is the newest known value (or a mean that stands for an older one)
    oldest = values[-1:] if pushed else []
    expected = [*oldest, 100.0, 101.0, 102.0, 103.0]
    torch.testing.assert_close(long.mean(), torch.tensor([sum(expected) / len(expected)]))


@pytest.mark.parametrize("iterations", [0, 1, 5, 9])
@pytest.mark.parametrize("m", [1, 2, 4, 8])
def test_loads_whatever_the_length_was(iterations, m):
    source, target = trained(4, iterations), trained(m, 3)
    before = copy.deepcopy(source.state_dict())
    result = target.load_state_dict(source.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    torch.testing.assert_close(source.state_dict(), before, rtol=0, atol=0)
    assert target.iterations == iterations and target.gradient_ring.pushed == iterations
    assert target.mean_square_ring.values.shape == (m, C)
    assert torch.equal(target.running_mean_square, source.running_mean_square)
    if iterations:
        newest = (iterations - 1) % m
        for name in ("mean_square_ring", "gradient_ring"):
            got, want = getattr(target, name).values, getattr(source, name).values
            assert torch.equal(got[newest], want[(iterations - 1) % 4])
    target(torch.randn(2, C, 3, 3, requires_grad=True)).sum().backward()
    assert all(value.isfinite().all() for value in target.state_dict().values())


def test_no_key_is_shared_by_different_shapes():
    """detectron2's checkpointer drops keys whose shape differs before a layer can see them."""
    a, b = trained(4, 1).state_dict(), trained(8, 1).state_dict()
    assert set(a) & set(b) and all(a[key].shape == b[key].shape for key in set(a) & set(b))
    assert a["running_mean_square"].shape == (C,)
    assert not any("running_var" in key for key in a)


@pytest.mark.parametrize("kept", [["running_mean_square"], ["running_mean_square", "count"]])
def test_a_checkpoint_without_rings_starts_the_warm_up_again(kept):
    """With or without the counters: values that are not there are not counted."""
    source = trained(4, 9)
    state = {
        key: value
        for key, value in source.state_dict().items()
        if key in ("weight", "bias") or any(key.endswith(name) for name in kept)
    }
    target = trained(4, 5)
    target.load_state_dict(state)
    assert target.iterations == target.gradient_ring.pushed == 0
    assert not target.mean_square_ring.values.any() and not target.gradient_ring.values.any()
    assert torch.equal(target.running_mean_square, source.running_mean_square)


def test_a_checkpoint_of_other_layers_changes_nothing():
    model = nn.Sequential(nn.Conv2d(1, C, 1), trained(4, 9))
    before = copy.deepcopy(model[1].state_dict())
    result = model.load_state_dict(nn.Sequential(nn.Conv2d(1, C, 1)).state_dict(), strict=False)
    assert set(result.missing_keys) == {"1.weight", "1.bias", "1.running_mean_square"}
    torch.testing.assert_close(model[1].state_dict(), before, rtol=0, atol=0)
    assert model.get_submodule("1").mean_square_ring.pushed == 9  # type: ignore[union-attr]


def test_batch_size_that_is_not_known_yet():
    """The values of the checkpoint wait for the first input, which sets the length."""
    source = trained(4, 9)
    target = MABN2d(C, simulated_batch_size=4, warmup_iters=2)
    target.load_state_dict(source.state_dict())
    assert target.iterations == 9
    assert torch.equal(target.mean_square_ring.values, source.mean_square_ring.values)
    target(torch.randn(2, C, 3, 3))
    assert target.mean_square_ring.values.shape == (2, C) and target.iterations == 10
    rows = [target.mean_square_ring.values[8 % 2], source.mean_square_ring.values[8 % 4]]
    assert torch.equal(*rows)


def test_through_detectron2s_checkpointer(tmp_path: Path):
    checkpoint = pytest.importorskip("fvcore.common.checkpoint")
    source = nn.Sequential(nn.Conv2d(1, C, 1), trained(4, 9))
    checkpoint.Checkpointer(source, str(tmp_path)).save("model")

    def values(model: nn.Module) -> list[Tensor]:
        layer = model[1]  # type: ignore[index]
        return [layer.mean_square_ring.mean(), layer.gradient_ring.mean()]

    for m in (4, 8):
        target = nn.Sequential(nn.Conv2d(1, C, 1), trained(m, 1))
        checkpointer = checkpoint.Checkpointer(target, str(tmp_path))
        state = checkpointer._load_file(str(tmp_path / "model.pth"))
        incompatible = checkpointer._load_model(state)
        assert not incompatible.incorrect_shapes
        assert not incompatible.missing_keys and not incompatible.unexpected_keys
        torch.testing.assert_close(values(target), values(source))


def test_moving_between_types_and_devices():
    layer = trained(4, 5)
    meta = copy.deepcopy(layer).to("meta")
    assert all(buffer.is_meta for buffer in meta.buffers())
    double = copy.deepcopy(layer).double()
    assert double.gradient_ring.values.dtype == torch.float64
    half = copy.deepcopy(layer).half()
    torch.testing.assert_close(dict(half.named_buffers()), dict(layer.named_buffers()))
    assert half.weight is not None and half.weight.dtype == torch.float16
