"""Shuffle heads, and SyncBN's, in one process and on several: permutations, groups, what travels.

Workers run each case and return what they got; the reference, written out in float64, is computed
here, where there is no process group.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from rethinking_bn.population import estimate_population_statistics
from rethinking_bn.randomness import announce_iteration
from tests.helpers import run_distributed
from tests.modeling.roi_cases import (
    CASCADE,
    KINDS,
    SHUFFLED,
    call,
    make_head,
    mask_config,
    norms,
    order_of,
    roi_inputs,
    written_out,
)
from tests.rois import (
    assert_equals_one_process,
    gradients,
    loss,
    on_rank,
    permutation,
    population,
    record_orders,
    rois,
    running,
    shares,
)

RUN_SEED, ITERATION = 5, 8
# rows of each image of each rank
ROWS: dict[int, list[list[tuple[int, ...]]]] = {
    2: [[(3, 4), (2, 5)], [(0, 0), (4, 1)], [(0, 0), (0, 0)], [(0, 1), (0, 0)]],
    3: [[(5, 2), (0, 0), (1, 3)], [(0, 2), (0, 0), (0, 0)]],
}
MANY_CLASSES = {"conv_dims": [4, 4, 4], "num_classes": 20}
CASES = [
    (kind, options, number)
    for kind, options in (
        ("box", {"shuffled": True}),
        ("box", {"shuffled": True, "norm_images": 1}),
        ("box", {"shuffled": True, "norm_images": 2, "fc_dims": []}),
        ("mask", {"shuffled": True}),
        ("mask", {"shuffled": True, "norm_images": 1, **MANY_CLASSES}),
        ("box", {"conv_norm": "SyncBN"}),
        ("mask", {"conv_norm": "SyncBN"}),
    )
    for number in range(4)
]


Case = tuple[str, dict[str, Any], list[tuple[int, ...]]]


def cases(world: int) -> list[Case]:
    return [(kind, options, ROWS[world][n]) for kind, options, n in CASES if n < len(ROWS[world])]


def _run_cases(rank: int) -> list[dict[str, Any]]:
    results = []
    for kind, options, rows in cases(dist.get_world_size()):
        head = make_head(kind, **options)
        announce_iteration(head, RUN_SEED, ITERATION)
        with head.image_rows(rows[rank]):
            results.append(on_rank(head, partial(call, head), [*map(sum, rows)], rank))
    return results


@cache
def results(world: int) -> list[tuple[Case, list[dict[str, Any]]]]:
    ranks = run_distributed(_run_cases, world)
    return list(zip(cases(world), zip(*ranks, strict=True), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [2, 3])
def test_equals_one_process_that_normalises_the_same_groups(world: int) -> None:
    for (kind, options, rows), ranks in results(world):
        total, order, groups = sum(map(sum, rows)), None, None
        if options.get("shuffled"):
            order = permutation(make_head(kind, **options), total, RUN_SEED, ITERATION)
            k = options.get("norm_images", 0)
            parts = len(rows[0]) // k if k else 1
            groups = [shares(share, parts) for share in shares(total, world)]
        ours = ("shuffled", "norm_images", "conv_norm")
        head = make_head(kind, **{k: v for k, v in options.items() if k not in ours})
        assert_equals_one_process(
            ranks,
            head,
            lambda x, sizes, head=head: written_out(head, x, sizes)[0],
            torch.arange(total) if order is None else order,
            [[total]] if groups is None else groups,
        )


@pytest.mark.parametrize("world", [2, 3])
def test_each_row_travels_once_and_returns_as_small_as_it_gets(world: int) -> None:
    """Defect 10: rows are shared equally, not padded, not sent to everybody."""
    for (kind, options, rows), ranks in results(world):
        if not options.get("shuffled"):
            assert not any(rank["sent"] for rank in ranks)
            continue
        total = sum(map(sum, rows))
        # mask logits are 2·6·6 numbers, the last normalised map 8·3·3; of equal ones the later
        numbers = {"box": 6, "mask": 2 * 36}[kind]
        if options.get("fc_dims") == []:
            numbers = 8 * 9
        elif "num_classes" in options:  # of 20·6·6 and 4·3·3 the latter
            numbers = 4 * 9
        for number, rank in enumerate(ranks):
            held, share = sum(rows[number]), shares(total, world)[number]
            there, back, back_gradient, there_gradient = rank["sent"]
            assert there[0] <= held and there[2] <= share
            # a row that arrived returns, and so do the gradients
            assert (back[0], back[2]) == (there[2], there[0])
            assert (back_gradient[0], there_gradient[0]) == (there[0], there[2])
            for exchange, width in ((there, 36), (back, numbers)):
                assert exchange[0] == 0 or exchange[1] == 8 * width


class Shuffling(nn.Module):
    """A box head on a rank's share of the rows of a batch."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.head, self.rank = make_head("box", shuffled=True), rank

    def forward(self, rows: tuple[int, ...]) -> Tensor:
        first = sum(rows[: self.rank])
        return self.head(rois(sum(rows), seed=len(rows))[first : first + rows[self.rank]])


def _population(rank: int) -> list[tuple[Tensor, Tensor]]:
    model = Shuffling(rank)
    estimate_population_statistics(model, [(4, 5), (0, 3)], 2, seed=RUN_SEED, progress=False)
    return running(model.head)


def test_population_training_of_shuffled_rows() -> None:
    ranks = run_distributed(_population, 2)
    head = make_head("box", shuffled=True)
    batches = []
    for index, counts in enumerate([(4, 5), (0, 3)]):
        x = rois(sum(counts), seed=len(counts))
        batches.append(x[permutation(head, len(x), RUN_SEED, index)])
    expected = population(head, batches, [shares(9, 2), shares(3, 2)])
    for statistics in ranks:
        torch.testing.assert_close(statistics, expected)


MODELS: dict[str, dict[str, Any]] = {
    "shuffled": SHUFFLED,
    "shuffled, autocast": SHUFFLED,
    "shuffled cascade": {**SHUFFLED, **CASCADE},
    "SyncBN": norms("SyncBN"),
    "SyncBN cascade": {**norms("SyncBN"), **CASCADE},
    "BN, one image": {"MODEL__ROI_HEADS__NORM_IMAGES": 1},
    "shuffled, one image": {**SHUFFLED, "MODEL__ROI_HEADS__NORM_IMAGES": 1},
}
COUNTS = [((4, 3), (0, 0)), ((0, 0), (0, 0)), ((5, 0), (0, 6))]


class Losses(nn.Module):
    def __init__(self, roi_heads: nn.Module) -> None:
        super().__init__()
        self.roi_heads = roi_heads

    def forward(self, counts: tuple[int, ...], seed: int) -> dict[str, Tensor]:
        return self.roi_heads(*roi_inputs(counts, seed))[1]


def _train(rank: int) -> dict[str, list[dict[str, Tensor]]]:
    """Take data-parallel steps in which a rank, or all, have no proposals."""
    seen = {}
    for name, keys in MODELS.items():
        torch.manual_seed(0)
        model = Losses(build_model(mask_config(**keys)).roi_heads)
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
        seen[name] = []
        with EventStorage() as storage:
            for counts in COUNTS:
                parallel.zero_grad()
                half = torch.autocast("cpu", dtype=torch.bfloat16)
                with half if name.endswith("autocast") else nullcontext():
                    losses = parallel(counts[rank], rank)
                sum(losses.values()).backward()
                buffers = {n: b.clone() for n, b in model.named_buffers()}
                losses = {n: loss.detach() for n, loss in losses.items()}
                seen[name].append({**gradients(model), **buffers, **losses})
                storage.step()
    return seen


def test_ranks_without_proposals_do_not_stop_data_parallel_training() -> None:
    """Defects 10 and 11, within detectron2's ROI heads."""
    ranks = run_distributed(_train, 2)
    for name in MODELS:
        for step, counts in enumerate(COUNTS):
            first, second = (rank[name][step] for rank in ranks)
            parameters = [key for key in first if key.endswith(("weight", "bias"))]
            assert parameters and all(torch.equal(first[k], second[k]) for k in parameters)
            assert all(v.isfinite().all() for rank in (first, second) for v in rank.values())
            some = any(first[key].abs().sum() > 0 for key in parameters)
            assert some == any(sum(of_rank) > 0 for of_rank in counts)
        untouched = {n: v for n, v in ranks[1][name][0].items() if "running_mean" in n}
        # rows come to the second rank, of others or by shuffling, or its statistics stay
        moved = any(value.abs().sum() > 0 for value in untouched.values())
        assert moved == ("BN, one image" != name)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_process_group_groups_are_shuffled_locally(kind: str) -> None:
    """Defect 10: no process group is needed. NORM_IMAGES 1 with n images stands for n ranks."""
    rows = (5, 0, 3)
    head, plain = make_head(kind, shuffled=True, norm_images=1), make_head(kind)
    plain.load_state_dict(head.state_dict())
    head.set_iteration(11, 4)
    x, again = (rois(8).requires_grad_() for _ in range(2))
    with head.image_rows(rows):
        out = call(head, x)
    order = permutation(head, 8, 11, 4)
    expected, statistics = written_out(plain, again[order], [2, 3, 3])
    expected = expected[order.argsort()]
    torch.testing.assert_close(out, expected)
    (loss(out) + loss(expected)).backward()
    torch.testing.assert_close(x.grad, again.grad)
    torch.testing.assert_close(gradients(head), gradients(plain))
    torch.testing.assert_close(running(head), statistics)


@pytest.mark.parametrize("norm", ["BN", "BatchStatBN"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_inference_it_is_the_unshuffled_head_with_the_same_checkpoint(
    kind: str, norm: str
) -> None:
    shuffled, plain = (make_head(kind, shuffled=s, conv_norm=norm) for s in (True, False))
    call(shuffled, rois(6))
    call(plain, rois(5))
    x = rois(7)
    for source, target in ((shuffled, plain), (plain, shuffled)):
        call(source.train(), rois(4, seed=3))
        target.load_state_dict(source.state_dict())
        orders = record_orders(shuffled)
        assert torch.equal(call(source.eval(), x), call(target.eval(), x))
        assert torch.equal(orders[0], x[:, 0, 0, 0])
    assert torch.equal(call(shuffled, x[:0]), call(plain, x[:0]))


@pytest.mark.parametrize("norm", ["GN", "SyncBN", ""])
def test_norms_to_which_it_makes_no_difference_are_not_shuffled(norm: str) -> None:
    options: dict[str, Any] = {"conv_norm": norm, "conv_dims": [32]}
    head, plain = (make_head("box", shuffled=s, **options) for s in (True, False))
    plain.load_state_dict(head.state_dict())
    orders = record_orders(head)
    assert torch.equal(head(rois(9)), plain(rois(9))) and not head.communicates
    assert torch.equal(orders[0], rois(9)[:, 0, 0, 0])


def test_permutations_follow_from_run_seed_iteration_head_and_call() -> None:
    box, mask = make_head("box", shuffled=True), make_head("mask", shuffled=True)
    seen = set()
    for run_seed, iteration in ((0, 0), (0, 1), (1, 0), (1, 1)):
        announce_iteration(nn.ModuleList([box, mask]), run_seed, iteration)
        seen |= {order_of(box), order_of(box), order_of(mask)}
    assert len(seen) == 12
    # a resumed run, with another head object and another history
    resumed = make_head("box", shuffled=True)
    order_of(resumed)
    box.set_iteration(7, 100)
    resumed.set_iteration(7, 100)
    assert order_of(box) == order_of(resumed) and order_of(box) == order_of(resumed)


def test_without_announcements_the_event_storage_tells_the_iteration() -> None:
    head, orders = make_head("box", shuffled=True), []
    for start in (0, 0, 5):
        with EventStorage(start) as storage:
            for _ in range(2):
                orders.append(order_of(head))
                storage.step()
            orders.append(order_of(head))
    resumed = make_head("box", shuffled=True)
    with EventStorage(6):
        assert order_of(resumed) == orders[7]
    assert orders[:3] == orders[3:6] and len(set(orders)) == 6
    alone = make_head("box", shuffled=True)  # neither: the calls are counted
    assert order_of(alone) == orders[0] and order_of(alone) not in orders


def checkpointed_and_plain(
    kind: str, forward: Any, recomputed: tuple[bool, ...], reentrant: bool
) -> None:
    """Compare gradients of a head whose calls are checkpointed with those of one without."""
    heads = [make_head(kind, shuffled=True, norm_images=1) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    inputs = []
    for head, checkpointed in zip(heads, (True, False), strict=True):
        head.set_iteration(3, 9)
        xs = [rois(9, seed).requires_grad_() for seed in range(len(recomputed))]

        def run(x: Tensor, head: Any = head) -> Tensor:
            with head.image_rows((4, 5)):
                return forward(head, x)

        outs = [
            checkpoint(run, x, use_reentrant=reentrant) if checkpointed and again else run(x)
            for x, again in zip(xs, recomputed, strict=True)
        ]
        sum(out.sin().sum() * (k + 1) for k, out in enumerate(outs)).backward()
        inputs.append([x.grad for x in xs])
    torch.testing.assert_close(inputs[0], inputs[1])
    torch.testing.assert_close(gradients(heads[0]), gradients(heads[1]))
    assert order_of(heads[0]) == order_of(heads[1])  # a recomputation is no call


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recomputed", [(True,), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_repeats_the_permutation(
    kind: str, recomputed: tuple[bool, ...], reentrant: bool
) -> None:
    checkpointed_and_plain(kind, call, recomputed, reentrant)


def test_two_uses_in_one_checkpointed_segment() -> None:
    checkpointed_and_plain("box", lambda head, x: head(x).sin() + head(x.flip(0)), (True,), False)
