"""RoI features, and heads over them written out in float64; torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rethinking_bn.layers import shuffle_rows
from rethinking_bn.randomness import derive_seed
from rethinking_bn.shuffle import exchange as row_exchange
from tests.reference import ema, normalize

CHANNELS, SIDE = 4, 3


def rois(count: int, seed: int = 0) -> Tensor:
    """Return RoI features whose statistics drift from row to row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, CHANNELS, SIDE, SIDE, generator=generator, dtype=torch.float64)
    row = torch.arange(count, dtype=torch.float64)[:, None, None, None]
    return x * (1 + row / 4) + row


def blocks_of(head: Any) -> list[tuple[Any, Any]]:
    """Return the convolutions of a head of detectron2's or torchvision's, with their norms."""
    if hasattr(head, "conv_norm_relus"):
        return [(conv, conv.norm) for conv in head.conv_norm_relus]
    return [(head[0][0], head[0][1]), (head[1][0], head[1][1])]


def running(head: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the mean and variance of each norm layer."""
    return [(norm.running_mean, norm.running_var) for _, norm in blocks_of(head)]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all gradients."""
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def written_out(
    head: Any, x: Tensor, groups: Sequence[int]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the last feature map with each group of rows normalised by itself, and the running
    statistics of each layer after one EMA step per group from mean 0 and variance 1."""
    assert sum(groups) == len(x)
    statistics = []
    for conv, norm in blocks_of(head):
        x = F.conv2d(x, conv.weight, padding=conv.padding, dilation=conv.dilation)
        parts = [part for part in x.split(list(groups)) if len(part)]
        mean, var = torch.zeros(x.shape[1]).double(), torch.ones(x.shape[1]).double()
        for part in parts:
            mean, var = ema(mean, var, [part])
        statistics.append((mean, var))
        parts = [normalize([part], [part], norm.weight, norm.bias)[0] for part in parts]
        x = F.relu(torch.cat(parts)) if parts else x
    return x, statistics


def population(head: Any, batches: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> Any:
    """Return the moments of what each layer sees when groups of rows are normalised apart."""
    seen: list[list[Tensor]] = [[] for _ in blocks_of(head)]
    for x, sizes in zip(batches, groups, strict=True):
        for inputs, (conv, norm) in zip(seen, blocks_of(head), strict=True):
            x = F.conv2d(x, conv.weight, padding=1)
            inputs.append(x)
            parts = [part for part in x.split(list(sizes)) if len(part)]
            x = torch.cat([normalize([p], [p], norm.weight, norm.bias)[0] for p in parts]).relu()
    values = [torch.cat(inputs).transpose(0, 1).flatten(1) for inputs in seen]
    return [(v.mean(1), v.var(1)) for v in values]


def record_orders(head: Any) -> list[Tensor]:
    """Return a list to which each forward adds the first value of every row, as normalised."""
    orders: list[Tensor] = []
    first = blocks_of(head)[0][0]
    first.register_forward_pre_hook(lambda _, args: orders.append(args[0][:, 0, 0, 0].clone()))
    return orders


def permutation(head: Any, rows: int, run_seed: int, iteration: int) -> Tensor:
    """Return the row in each slot of a head's first shuffle; not within a process group."""
    seed = derive_seed(run_seed, iteration, head.seed_of_head, 0)
    return shuffle_rows(torch.arange(rows), generator_seed=seed)[0]


def shares(total: int, parts: int) -> list[int]:
    """Return how many of all rows each rank normalises."""
    return [(i + 1) * total // parts - i * total // parts for i in range(parts)]


def loss(out: Tensor, first: int = 0) -> Tensor:
    """A loss of the rows from ``first`` on, with another gradient for each number of each row."""
    flat = out.flatten(1)
    row = torch.arange(first + 1, first + 1 + len(out), dtype=torch.float64)
    number = torch.arange(1, 1 + flat.shape[1], dtype=torch.float64)
    return ((flat * number).sin() * row[:, None]).sum()


def on_rank(
    head: Any, run: Callable[[Tensor], Tensor], rows: Sequence[int], rank: int
) -> dict[str, Any]:
    """Run a head forward and backward on a rank's share; ``rows`` says how many each rank has."""
    first = sum(rows[:rank])
    x = rois(sum(rows))[first : first + rows[rank]].clone().requires_grad_()
    with mock.patch.object(
        row_exchange, "all_to_all_rows", wraps=row_exchange.all_to_all_rows
    ) as exchange:
        out = run(x)
        loss(out, first).backward()
    sent = [
        (len(packed), packed[:1].nbytes, sum(received))
        for _, (_, packed, received, *_), _ in exchange.mock_calls
    ]
    return {
        "out": out.detach(),
        "grad": x.grad,
        "gradients": gradients(head),
        "running": running(head),
        "sent": sent,
    }


def assert_equals_one_process(
    ranks: Sequence[dict[str, Any]],
    head: Any,
    run: Callable[[Tensor, Sequence[int]], Tensor],
    order: Tensor,
    groups: Iterable[Sequence[int]],
) -> None:
    """Compare what ranks computed with one process that normalises the same groups of rows.

    Args:
        ranks: of :func:`on_rank`.
        head: an equal head in one process.
        run: (rows, groups) -> the head's output, written out.
        order: the row in each slot.
        groups: for each rank, how many slots are normalised together; one for all: pooled.
    """
    groups = list(groups)
    x = rois(len(order)).requires_grad_()
    out = run(x[order], [*chain(*groups)])[order.argsort()]
    loss(out).backward()
    torch.testing.assert_close(torch.cat([rank["out"] for rank in ranks]), out)
    torch.testing.assert_close(torch.cat([rank["grad"] for rank in ranks]), x.grad)
    for name, gradient in gradients(head).items():
        torch.testing.assert_close(sum(rank["gradients"][name] for rank in ranks), gradient)
    parts = x.detach()[order].split([sum(of_rank) for of_rank in groups])
    for rank, part, of_rank in zip(ranks, parts, groups, strict=False):
        # every rank's moving averages follow what it normalised
        torch.testing.assert_close(rank["running"], written_out(head, part, of_rank)[1])
    if len(groups) == 1:
        assert all(str(rank["running"]) == str(ranks[0]["running"]) for rank in ranks)
