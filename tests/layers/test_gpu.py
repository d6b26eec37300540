"""Every layer on a GPU: beside float64 on the CPU, without a wait, compiled, over NCCL."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rethinking_bn.layers import (
    BatchNorm2d,
    MABN2d,
    SplitBatchNorm2d,
    SyncBatchNorm2d,
    compile_norms,
)
from tests.layers.kinds import kinds, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

C, SIZES = 16, [(24, 20), (12, 10), (3, 2), (1, 2)]
LAYERS = kinds(C, len(SIZES))
LAYERS["split"] = lambda: SplitBatchNorm2d(C, 2)
LAYERS["MABN"] = lambda: MABN2d(C, batch_size=3, simulated_batch_size=6, warmup_iters=1)


def features(seed: int, dtype: torch.dtype, last: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    form = torch.channels_last if last else torch.contiguous_format
    return [
        (torch.randn(3, C, *size, generator=generator) + 2).to(dtype).to(memory_format=form)
        for size in SIZES
    ]


def step(layer: nn.Module, xs: list[Tensor]) -> list[Tensor]:
    """Return outputs and gradients of a training step."""
    leaves = [x.detach().clone().requires_grad_() for x in xs]
    ys = run(layer, leaves)
    dys = [(i + 1) * y.detach().cos() for i, y in enumerate(ys)]
    return [*ys, *torch.autograd.grad(ys, [*leaves, *layer.parameters()], dys)]


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.cpu().double(), b.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("kind", LAYERS)
def test_beside_float64(kind: str, dtype: torch.dtype, tolerance: float, last: bool) -> None:
    wide = LAYERS[kind]().double()
    layer = copy.deepcopy(wide).float().cuda()
    for seed in range(3):
        xs = features(seed, dtype, last)
        got = step(layer, [x.cuda() for x in xs])
        assert_close(got, step(wide, [x.double() for x in xs]), tolerance)
    buffers = [b for b in layer.buffers() if b.is_floating_point()]
    assert_close(buffers, [b for b in wide.buffers() if b.is_floating_point()], tolerance)
    xs = features(9, dtype, last)
    if kind.count("/") == 2:
        layer.eval(), wide.eval()
        assert_close(layer([x.cuda() for x in xs]), wide([x.double() for x in xs]), tolerance)


@pytest.mark.parametrize("kind", [k for k in LAYERS if k != "split"])  # told its rows by the host
def test_no_step_waits_for_the_device(kind: str) -> None:
    layer = LAYERS[kind]().cuda()
    xs = [x.cuda() for x in features(0, torch.float32, False)]
    xs[0][0, 0, 0, 0] = float("inf")
    step(layer, xs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, xs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_compiled(kind: str) -> None:
    model = nn.ModuleList([LAYERS[kind]()]).cuda()
    plain = copy.deepcopy(model)
    compile_norms(model)
    for seed in range(3):
        xs = [x.cuda() for x in features(seed, torch.float32, False)]
        assert_close(
            [t.cpu() for t in step(model[0], xs)], [t.cpu() for t in step(plain[0], xs)], 1e-3
        )


def test_nccl_with_one_rank(tmp_path: Any) -> None:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        layer, plain = SyncBatchNorm2d(C).cuda(), BatchNorm2d(C).cuda()
        xs = [x.cuda() for x in features(0, torch.float32, False)]
        assert_close(step(layer, xs), [t.cpu() for t in step(plain, xs)], 1e-6)
    finally:
        dist.destroy_process_group()
