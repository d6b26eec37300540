"""Compile for sm_90 what training steps of the layers launch, without a GPU and without running it.

    python tests/numerics/triton/compiled.py [--all]

Every launch is bound and specialised as it would be on the GPU, compiled down to machine code, and
left at that. Prints each kernel's widest load.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import time
from typing import Any

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from rethinking_bn.layers import BatchNorm2d, MABN2d, MultiDomainBatchNorm2d
from rethinking_bn.numerics.triton import choice, plan

FPN = [(2, 256, h, w) for h, w in ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))]
ROIS = [(512, 256, 14, 14)]


class NoDevice:
    """What Triton asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def is_active(self) -> bool:
        return True


def collect_compiled() -> dict[int, tuple[str, Any, float]]:
    """Let launches compile only; return where the kernels end up, with names and seconds."""
    compiled: dict[int, tuple[str, Any, float]] = {}
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        start = time.perf_counter()
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        if id(kernel) not in compiled:
            compiled[id(kernel)] = (self.__name__, kernel, time.perf_counter() - start)
        return kernel

    JITFunction.run = run
    driver.set_active(NoDevice())
    os.environ["RETHINKING_BN_KERNELS"] = "triton"
    choice._triton = lambda: (None, True)  # CPU tensors stand for the GPU's
    return compiled


def step(layer: nn.Module, shapes: list[tuple[int, ...]], dtype: torch.dtype, last: bool) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    xs = [torch.empty(s, dtype=dtype, memory_format=layout).requires_grad_() for s in shapes]
    several = isinstance(layer, MultiDomainBatchNorm2d)
    ys = layer(xs) if several else [layer(x) for x in xs]
    torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels for sm_90 without a GPU.")
    parser.add_argument("--all", action="store_true", help="every row, type and layout")
    everything = parser.parse_args().all
    compiled = collect_compiled()
    rows = list(itertools.product(("shared", "domain_specific"), repeat=3))
    types = (torch.float32, torch.bfloat16, torch.float16)
    matrix = list(itertools.product(rows, types, (False, True), (plan.FOLD, 0)))
    if not everything:
        # each kernel, and each of their branches, in one of the combinations
        matrix = [
            (rows[0], torch.float32, False, plan.FOLD),
            (rows[5], torch.float32, False, plan.FOLD),
            (rows[7], torch.bfloat16, True, 0),
            (rows[3], torch.float16, False, 0),
        ]
    for choices, dtype, last, fold in matrix:
        plan.FOLD = fold
        plan.make_plan.cache_clear()
        names = ("train_stats", "population_stats", "affine")
        layer = MultiDomainBatchNorm2d(256, 5, **dict(zip(names, choices, strict=True)))
        step(layer, FPN, dtype, last)
    plan.FOLD = 1000
    plan.make_plan.cache_clear()
    for momentum, affine in ((0.1, True), (None, False)):
        one = BatchNorm2d(256, momentum=momentum, affine=affine)
        with one.row_groups((256, 256)):
            step(one, ROIS, torch.float16, False)
    step(MABN2d(256, batch_size=2), FPN[2:3], torch.float32, False)
    step(MABN2d(256, batch_size=2, affine=False), FPN[2:3], torch.bfloat16, True)
    for name, kernel, seconds in compiled.values():
        text = kernel.asm["ptx"]
        loads = re.findall(r"ld\.global[\w.:]*?(?:\.(v[24]))?\.b(\d+)", text)
        widest = max((int(v[1:] or 1) if v else 1) * int(b) // 8 for v, b in loads)
        print(f"{name:16s} {seconds:5.1f} s  loads of up to {widest} bytes")
        assert kernel.asm["cubin"]
    print(f"Triton {triton.__version__}: {len(compiled)} kernels for sm_90")


if __name__ == "__main__":
    main()
