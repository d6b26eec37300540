"""shuffle_rows on 2, 3 and 4 processes equals one process that holds all rows, bit for bit.

The workers of each world size are started once; every rank can make the rows of all ranks, and
so knows what it must receive.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rethinking_bn.distributed import ALL_GATHER
from rethinking_bn.layers import shuffle_rows, unshuffle_rows
from tests.helpers import run_distributed
from tests.shuffle.test_rows import DTYPES, random_bits, same_bits

TRAILING: list[tuple[int, ...]] = [(), (3,), (2, 3), (0,), (3, 1, 2), (3, 2, 2), (2, 3, 2, 2)]
FLOATS = [dtype for dtype in DTYPES if dtype.is_floating_point]


class Case:
    """Random row counts on W ranks, zeros among them, and which rows belong where."""

    def __init__(self, rng: random.Random, rank: int, world: int) -> None:
        most = rng.choice([0, 1, 3, 9])
        self.counts = [rng.choice([0, rng.randint(0, most)]) for _ in range(world)]
        self.seed = rng.randint(-(2**70), 2**70)
        self.trailing = rng.choice(TRAILING)
        self.generator = torch.Generator().manual_seed(rng.randrange(2**31))
        total, first = sum(self.counts), sum(self.counts[:rank])
        self.total = total
        self.mine = slice(first, first + self.counts[rank])
        self.slots = slice(rank * total // world, (rank + 1) * total // world)
        self.order = permutation_of_one_process(total, self.seed)


def permutation_of_one_process(rows: int, seed: int) -> Tensor:
    """The row in each slot, found without the process group: a group of this rank alone."""
    alone = _GROUPS["alone"]
    return shuffle_rows(torch.arange(rows), generator_seed=seed, group=alone)[0]


_GROUPS: dict[str, dist.ProcessGroup] = {}


def _all_checks(rank: int, checks: list[Callable[[int, int], None]]) -> None:
    world = dist.get_world_size()
    for member in range(world):
        group = dist.new_group([member])
        if member == rank:
            assert isinstance(group, dist.ProcessGroup)
            _GROUPS["alone"] = group
    for check in checks:
        check(rank, world)


def _round_trips(rank: int, world: int) -> None:
    rng = random.Random(world)
    for number in range(120):
        case = Case(rng, rank, world)
        dtype = DTYPES[number % len(DTYPES)]
        all_rows = random_bits((case.total, *case.trailing), dtype, case.generator)
        x = all_rows[case.mine]
        rows, state = shuffle_rows(x, generator_seed=case.seed)
        assert same_bits(rows, all_rows[case.order[case.slots]])
        assert case.total // world <= len(rows) <= -(-case.total // world)
        assert same_bits(unshuffle_rows(rows, state), x)
        assert not rows.requires_grad
        again, _ = shuffle_rows(x, generator_seed=case.seed)
        assert same_bits(rows, again)


def _gradients(rank: int, world: int) -> None:
    rng = random.Random(world)
    for number in range(60):
        case = Case(rng, rank, world)
        dtype = FLOATS[number % len(FLOATS)]
        shape = (case.total, *case.trailing)
        features, by_slot, by_row = (
            torch.randn(shape, generator=case.generator).to(dtype) for _ in range(3)
        )
        whole = features.clone().requires_grad_()
        all_out = (whole[case.order] * by_slot)[case.order.argsort()]
        (expected,) = torch.autograd.grad(all_out, whole, by_row)

        with_grad = [rng.random() < 0.6 for _ in range(world)]
        x = features[case.mine].clone().requires_grad_(with_grad[rank])
        rows, state = shuffle_rows(x, generator_seed=case.seed)
        assert rows.requires_grad == any(with_grad)
        y = rows * by_slot[case.slots]
        if not len(rows):
            y = y.detach()  # a head that answers an empty input with a constant
        out = unshuffle_rows(y, state)
        assert same_bits(out, all_out[case.mine])
        if any(with_grad):
            out.backward(by_row[case.mine])
        if with_grad[rank]:
            assert x.grad is not None and same_bits(x.grad, expected[case.mine])
        else:
            assert x.grad is None


def _trainable_head_on_fixed_features(rank: int, world: int) -> None:
    """No shuffled row needs grad, the head's weight does: the sum over ranks is one process's."""
    counts = [3, 0, 2, 1][:world]
    all_rows = torch.arange(float(sum(counts)))[:, None] + 1
    first = sum(counts[:rank])
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    rows, state = shuffle_rows(all_rows[first : first + counts[rank]], generator_seed=1)
    out = unshuffle_rows(rows.double() * weight, state)
    assert not rows.requires_grad and out.requires_grad
    out.square().sum().backward()
    assert weight.grad is not None
    dist.all_reduce(weight.grad)
    assert weight.grad == 2 * all_rows.double().square().sum()


def _memory_formats(rank: int, world: int) -> None:
    last = torch.channels_last
    for formats in ([last] * world, [torch.contiguous_format] + [last] * (world - 1)):
        generator = torch.Generator().manual_seed(5)
        counts = [4, 3, 0, 2][:world]
        all_rows = torch.randn(sum(counts), 3, 2, 4, generator=generator)
        first = sum(counts[:rank])
        x = all_rows[first : first + counts[rank]].to(memory_format=formats[rank])
        x.requires_grad_()
        rows, state = shuffle_rows(x, generator_seed=2)
        order = permutation_of_one_process(len(all_rows), 2)
        slots = slice(rank * len(order) // world, (rank + 1) * len(order) // world)
        assert torch.equal(rows, all_rows[order[slots]])
        # What comes back may have another format on every rank, or other dimensions.
        out = unshuffle_rows(rows.contiguous(memory_format=formats[rank]), state)
        assert torch.equal(out, x)
        assert torch.equal(unshuffle_rows(rows.flatten(1), state), x.flatten(1))
        out.backward(all_rows[first : first + counts[rank]])
        assert x.grad is not None and torch.equal(x.grad, x)
        if formats[0] == last:
            for tensor in (rows, out):
                assert tensor.is_contiguous(memory_format=last)


def _autocast_and_checkpointing(rank: int, world: int) -> None:
    counts = [5, 0, 3, 2][:world]
    generator = torch.Generator().manual_seed(8)
    all_rows = torch.randn(sum(counts), 4, generator=generator)
    weight = torch.randn(3, 4, generator=generator)
    first = sum(counts[:rank])
    x = all_rows[first : first + counts[rank]].clone().requires_grad_()

    def head(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rows, state = shuffle_rows(x, generator_seed=3)
            return unshuffle_rows(torch.nn.functional.linear(rows, weight), state)

    out = head(x)
    assert out.dtype == torch.bfloat16 and out.shape == (counts[rank], 3)
    (plain,) = torch.autograd.grad(out.float().square().sum(), x)
    for use_reentrant in (False, True):
        x.grad = None
        checkpoint(head, x, use_reentrant=use_reentrant).float().square().sum().backward()
        assert x.grad is not None and torch.equal(x.grad, plain)


def _only_rows_that_leave_are_sent(rank: int, world: int) -> None:
    sent: list[int] = []
    headers: list[int] = []

    def counting(collective: Callable[..., Any], log: list[int]) -> Callable[..., Any]:
        def call(out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            log.append(x.numel() * x.element_size())
            return collective(out, x, *args, **kwargs)

        return call

    counts = [7, 0, 9, 4][:world]
    first = sum(counts[:rank])
    order = permutation_of_one_process(sum(counts), 21)
    arriving = order[rank * len(order) // world : (rank + 1) * len(order) // world]
    stay = int(((arriving >= first) & (arriving < first + counts[rank])).sum())
    leave, come = counts[rank] - stay, len(arriving) - stay
    with (
        mock.patch.object(dist, "all_to_all_single", counting(dist.all_to_all_single, sent)),
        mock.patch.object(dist, ALL_GATHER, counting(getattr(dist, ALL_GATHER), headers)),
    ):
        x = torch.randn(counts[rank], 6, requires_grad=True)
        rows, state = shuffle_rows(x, generator_seed=21)
        out = unshuffle_rows(rows.double(), state)
        out.sum().backward()
    # Shuffle, unshuffle (of 8-byte numbers), and the backward of each in reverse.
    assert sent == [leave * 24, come * 48, leave * 48, come * 24]
    assert len(headers) == 1 and headers[0] <= 64


def _disagreements(rank: int, world: int) -> None:
    odd = rank == world - 1
    others = "rank " + ", ".join(map(str, range(world - 1)))
    x = torch.zeros(2, 3, 4, requires_grad=True)
    scalar = torch.zeros(())
    last = f"rank {world - 1}"
    cases: list[tuple[Tensor, int, bool, list[str]]] = [
        (x[:, :2] if odd else x, 1, True, [f"shape is (3, 4) on {others} and (2, 4) on {last}"]),
        (x.half() if odd else x, 1, True, [f"torch.float32 on {others} and torch.float16 on"]),
        (x, 2**80 + odd, True, [f"seed is {2**80} on {others} and {2**80 + 1} on {last}"]),
        (x, 1, not odd, [f"gradients is enabled on {others} and disabled on {last}"]),
        (scalar if odd else x, 1, True, [f"missing (0-dimensional tensor) on {last}"]),
        (scalar, 1, True, ["row shape is missing (0-dimensional tensor) on rank 0, "]),
    ]
    for tensor, seed, gradients, said in cases:
        with nullcontext() if gradients else torch.no_grad():
            with pytest.raises(ValueError) as error:
                shuffle_rows(tensor, generator_seed=seed)
        for words in said:
            assert words in str(error.value), str(error.value)
        messages: list[Any] = [None] * world
        dist.all_gather_object(messages, str(error.value))
        assert len(set(messages)) == 1
    # Without any gradient to bring back, the grad mode is everybody's own affair.
    with torch.no_grad() if odd else nullcontext():
        rows, state = shuffle_rows(x.detach(), generator_seed=1)
    assert torch.equal(unshuffle_rows(rows, state), x)


def _groups(rank: int, world: int) -> None:
    """Ranks are those within the group, which need not be those of the world."""
    members = list(range(1, world))
    group = dist.new_group(members)
    if isinstance(group, dist.ProcessGroup):  # this rank is a member
        counts = [3, 1, 4][: world - 1]
        place = members.index(rank)
        all_rows = torch.arange(float(sum(counts)))
        first = sum(counts[:place])
        x = all_rows[first : first + counts[place]].clone().requires_grad_()
        rows, state = shuffle_rows(x, generator_seed=6, group=group)
        order = permutation_of_one_process(len(all_rows), 6)
        size = len(members)
        slots = slice(place * len(order) // size, (place + 1) * len(order) // size)
        assert torch.equal(rows, all_rows[order[slots]])
        out = unshuffle_rows(rows.square(), state)
        out.sum().backward()
        assert x.grad is not None and torch.equal(x.grad, 2 * x)
    dist.barrier()


def _data_parallel_with_ranks_without_rows(rank: int, world: int) -> None:
    """More ranks than rows, and the backbone's gradient comes through the shuffle."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torch.nn.Linear(3, 3)
            self.head = torch.nn.Linear(3, 2)

        def forward(self, x: Tensor, seed: int) -> Tensor:
            rows, state = shuffle_rows(self.backbone(x), generator_seed=seed)
            return unshuffle_rows(self.head(rows), state)

    torch.manual_seed(0)
    net = Net().double()
    reference = Net().double()
    reference.load_state_dict(net.state_dict())
    parallel = torch.nn.parallel.DistributedDataParallel(net)
    for seed in range(3):
        counts = [int(r == seed % world) for r in range(world)]
        all_rows = torch.randn(1, 3, dtype=torch.float64)
        x = all_rows if counts[rank] else all_rows[:0]
        parallel.zero_grad()
        reference.zero_grad()
        parallel(x, seed).square().sum().backward()
        reference.head(reference.backbone(all_rows)).square().sum().backward()
        for ours, wanted in zip(net.parameters(), reference.parameters(), strict=True):
            assert ours.grad is not None and wanted.grad is not None
            torch.testing.assert_close(ours.grad * world, wanted.grad)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_equals_one_process(world):
    checks = [
        _round_trips,
        _gradients,
        _trainable_head_on_fixed_features,
        _memory_formats,
        _autocast_and_checkpointing,
        _only_rows_that_leave_are_sent,
        _disagreements,
        _groups,
        _data_parallel_with_ranks_without_rows,
    ]
    run_distributed(_all_checks, world, checks, timeout=120)
