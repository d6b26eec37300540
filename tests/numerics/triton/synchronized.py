"""Statistics pooled over two processes by the kernels, beside one process in float64."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from rethinking_bn.layers import MultiDomainBatchNorm2d, SyncBatchNorm2d
from tests import reference
from tests.helpers import run_distributed

C = 2
# train_stats, population_stats, affine; what ranks hold differs, and rank 1 lacks a level
CHOICES = [
    ("shared", "shared", "shared"),
    ("shared", "domain_specific", "domain_specific"),
    ("domain_specific", "shared", "shared"),
    ("domain_specific", "domain_specific", "domain_specific"),
]
SHAPES = [[(2, C, 3, 2), (1, C, 2, 2)], [(1, C, 4, 2), (0, C, 2, 2)]]


def inputs(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator) + 1000 for shape in SHAPES[rank]]


def layer(choices: tuple[str, ...], dtype: torch.dtype, sync: bool) -> MultiDomainBatchNorm2d:
    torch.manual_seed(7)
    names = ("train_stats", "population_stats", "affine")
    chosen = dict(zip(names, choices, strict=True))
    made = MultiDomainBatchNorm2d(C, 2, sync=sync, dtype=dtype, **chosen)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.rand(C))
    return made


def step(made: torch.nn.Module, xs: list[Tensor]) -> tuple[list[Tensor], ...]:
    ys = made(xs)
    reference.loss(ys).backward()
    grads = [x.grad for x in xs], [p.grad for p in made.parameters()]
    return [y.detach() for y in ys], *grads, [b.clone() for b in made.buffers()]


def on_a_rank(rank: int) -> list[tuple[list[Tensor], ...]]:
    os.environ["RETHINKING_BN_KERNELS"] = "triton"
    results = []
    for choices in CHOICES:
        xs = [x.requires_grad_() for x in inputs(rank)]
        results.append(step(layer(choices, torch.float32, True), xs))
    # a rank where nothing needs a gradient takes part in the backward's collective all the same
    alone = SyncBatchNorm2d(C)
    alone.requires_grad_(rank == 0)
    alone(inputs(rank)[0]).sum().backward()
    return results


def main() -> None:
    os.environ["RETHINKING_BN_KERNELS"] = "eager"
    ranks = run_distributed(on_a_rank, 2, timeout=200)
    for i, choices in enumerate(CHOICES):
        # one process: a level's images of all ranks, which differ in size, as further levels
        whole = [[x.double().requires_grad_() for x in inputs(rank)] for rank in (0, 1)]
        expected = layer(choices, torch.float64, False)
        pooled, one = choices[0] == "shared", choices[:2] == ("shared", "shared")
        affine = [[p.detach().requires_grad_() for p in ps] for ps in expected._affine_rows()]
        outputs = [
            [
                reference.normalize(
                    [x],
                    [*whole[0], *whole[1]] if pooled else [whole[0][level], whole[1][level]],
                    *(ps[level if len(ps) > 1 else 0] for ps in affine),
                )[0]
                for level, x in enumerate(xs)
            ]
            for xs in whole
        ]
        sum(reference.loss(ys) for ys in outputs).backward()
        for rank in (0, 1):
            got_outputs, got_grads, got_affine, _ = ranks[rank][i]
            for got, want in zip(got_outputs, outputs[rank], strict=True):
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
            for got, x in zip(got_grads, whole[rank], strict=True):
                torch.testing.assert_close(got.double(), x.grad, rtol=1e-5, atol=1e-5)
        summed = [a + b for a, b in zip(ranks[0][i][2], ranks[1][i][2], strict=True)]
        names = [name.rsplit(".")[-1] for name, _ in expected.named_parameters()]
        for kind, ps in zip(("weight", "bias"), affine, strict=True):
            of_kind = [g for g, name in zip(summed, names, strict=True) if name == kind]
            for got, p in zip(of_kind, ps, strict=True):
                torch.testing.assert_close(got.double(), p.grad, rtol=1e-5, atol=1e-5)
        # running statistics: one row, or one a level, of everything that the ranks hold
        levels = [[whole[0][level], whole[1][level]] for level in (0, 1)]
        parts = [[*levels[0], *levels[1]]] if one else levels
        states = [(torch.zeros(C).double(), torch.ones(C).double())] * len(
            expected._statistics_holders()
        )
        for k, part in enumerate(parts):
            at = k if len(states) > 1 else 0
            states[at] = reference.ema(*states[at], part)
        buffers = [b for b in ranks[0][i][3] if b.is_floating_point()]
        for got, want in zip(buffers, [v for state in states for v in state], strict=True):
            torch.testing.assert_close(got.double(), want.detach(), rtol=1e-6, atol=1e-6)
        for a, b in zip(ranks[0][i][3], ranks[1][i][3], strict=True):
            assert torch.equal(a, b), "the ranks' buffers differ"
    print(f"{len(CHOICES)} choices: two processes equal one")


if __name__ == "__main__":
    main()
