"""How many operators a training step dispatches, and that none makes the host wait on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.contenders import TOY_SIZES, Contender, make_levels
from benchmarks.dispatch import count_operators, one_tensor, rows
from rethinking_bn.layers import BatchNorm2d, CycleBatchNorm2d, MultiDomainBatchNorm2d
from rethinking_bn.numerics.normalize_function import Normalize

# a step forward and backward over five levels, or one tensor; concatenate/split has 6, five
# nn.BatchNorm2d 20 and one 4
MOST_OPERATORS = {
    "row 1": 38,
    "row 2": 39,
    "row 3": 50,
    "row 4": 25,
    "row 5": 42,
    "row 6": 17,
    "cycle": 48,
    "BatchNorm2d": 8,
    "SyncBatchNorm2d": 8,
}
CHANNELS = 8
SHAPES = [(2, CHANNELS, h, w) for h, w in ((8, 12), (4, 6), (2, 3), (1, 2))]
ROWS = ["sss", "sds", "dss", "dds", "dsd", "ddd"]
CHOICE = {"s": "shared", "d": "domain_specific"}


def steps() -> dict[str, Contender]:
    levels = make_levels(TOY_SIZES, CHANNELS)
    layer = CycleBatchNorm2d(CHANNELS, len(levels.xs))
    sides = [*rows(levels).values(), Contender("cycle", layer, levels, cycle=True)]
    return {side.name: side for side in sides} | one_tensor(levels)


@pytest.mark.parametrize("name", MOST_OPERATORS)
def test_operators_of_a_step(name: str) -> None:
    step = steps()[name].step
    for _ in range(3):
        step()
    operators = count_operators(step)
    assert operators.total() <= MOST_OPERATORS[name], operators


class Cuda(TorchDispatchMode):
    """Stands for a GPU on fake tensors: counts operators, and refuses those that synchronise."""

    WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        assert name not in self.WAITING, f"{name} synchronises"
        masks = args[1] if name == "index" else ()
        assert not any(m.dtype == torch.bool for m in masks if m is not None), "synchronises"
        if name in ("_to_copy", "copy_"):
            self._check_copy(name, args, kwargs)
        if not func.is_view and name != "device":
            self.names[name] += 1
        own = getattr(self, f"_{name}", None)  # CUDA's operators without a fake implementation
        return func(*args, **kwargs) if own is None else own(*args)

    def _check_copy(self, name, args, kwargs):
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device if name == "copy_" else kwargs.get("device") or source.device
        # non_blocking is the third argument of copy_
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))
        types = {source.device.type, torch.device(target).type}
        if len(types) > 1:
            assert not waits and source.device.type == "cpu", f"{name} between {types} synchronises"
        assert source.dim() < 4, f"a feature map is copied by {name}"

    @staticmethod
    def _batch_norm_update_stats(x, mean, variance, momentum):
        assert x.device.type == "cuda" and mean is None and variance is None
        return tuple(x.new_empty(2, x.shape[1], dtype=torch.float32).unbind())

    @staticmethod
    def _batch_norm_backward_reduce(dy, x, mean, invstd, weight, *wanted):
        assert dy.stride() == x.stride() and mean.dtype == invstd.dtype == torch.float32
        assert wanted == (True, False, False)
        return torch.empty_like(mean), torch.empty_like(mean), None, None

    @staticmethod
    def _batch_norm_backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_centred, count):
        assert dy.stride() == x.stride() and dy.dtype == x.dtype and count.dtype == torch.int32
        assert {t.shape for t in (mean, invstd, sum_dy, sum_dy_centred)} == {(CHANNELS,)}
        assert weight is None or weight.dtype == mean.dtype
        return torch.empty_like(x)


@contextmanager
def cuda() -> Iterator[Cuda]:
    """Tensors are fake within; within the mode that it yields, a GPU's are looked at."""
    with FakeTensorMode(), torch.no_grad():
        yield Cuda()


def features(dtype: torch.dtype, channels_last: bool, shapes: Any = SHAPES) -> list[Tensor]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return [torch.empty(s, dtype=dtype, device="cuda", memory_format=memory_format) for s in shapes]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_forward_on_a_gpu(
    row: str, dtype: torch.dtype, channels_last: bool, momentum: float | None
) -> None:
    with cuda() as mode:
        train, population, affine = (CHOICE[letter] for letter in row)
        layer = MultiDomainBatchNorm2d(
            CHANNELS,
            len(SHAPES),
            train_stats=train,
            population_stats=population,
            affine=affine,
            momentum=momentum,
            device="cuda",
        )
        xs = features(dtype, channels_last)
        with mode:
            ys = layer(xs)
        assert [(y.shape, y.dtype) for y in ys] == [(s, dtype) for s in SHAPES]
    fused = ("native_batch_norm", "cudnn_batch_norm", "batch_norm_update_stats")
    assert sum(mode.names[name] for name in fused) == (8 if train == "shared" else 4)
    assert mode.names.total() <= (42 if momentum else 55), mode.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("pools", "affines"), [(1, 0), (1, 1), (4, 0), (4, 1), (4, 4)])
def test_backward_on_a_gpu(dtype: torch.dtype, pools: int, affines: int) -> None:
    """The autograd engine itself needs a GPU, so the function's two halves are called.

    Weights that differ within a pool take plain operators.
    """
    with cuda() as mode:
        affine = [
            None
            if not affines
            else torch.empty((CHANNELS,) if affines == 1 else (affines, CHANNELS), device="cuda")
            for _ in range(2)
        ]
        mean, variance = torch.empty(2, pools, CHANNELS, device="cuda").unbind()
        counts = tuple(range(5, 5 + pools))
        index = [i if pools > 1 else 0 for i in range(len(SHAPES))]
        xs, dys = features(dtype, True), features(dtype, True)
        ctx = SimpleNamespace(needs_input_grad=(True,) * (10 + len(xs)))
        ctx.save_for_backward = lambda *saved: setattr(ctx, "saved_tensors", saved)
        with mode:
            Normalize.forward(
                ctx, *affine, mean, variance, counts, index, 1e-5, False, None, False, *xs
            )
            mode.names.clear()
            gradients = Normalize.backward(ctx, *dys)
    assert [g.dtype for g in gradients[-len(xs) :]] == [dtype] * len(xs)
    assert mode.names["batch_norm_backward_elemt"] == len(xs)
    assert mode.names.total() <= 20, mode.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tensor_on_a_gpu(dtype: torch.dtype) -> None:
    with cuda() as mode:
        layer = BatchNorm2d(CHANNELS, device="cuda")
        (x,) = features(dtype, False, SHAPES[:1])
        with mode:
            assert layer(x).dtype == dtype
    assert mode.names.total() <= 8, mode.names


def test_the_stand_in_refuses_what_waits() -> None:
    with cuda() as mode, mode:
        x = torch.empty(2, 3, 4, 5, device="cuda")
        for wait in (lambda: x.sum().item(), lambda: x.sum().cpu(), lambda: x[x > 0]):
            with pytest.raises(AssertionError, match="synchronises"):
                wait()
        with pytest.raises(AssertionError, match="synchronises"):
            torch.ones(3).to("cuda")
        with pytest.raises(AssertionError, match="feature map is copied"):
            x.double()
