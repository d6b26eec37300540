"""Heads on several processes equal one process that normalises the same groups of rows.

The workers run each case and return what they got; the reference, written out in float64, is
computed here, where there is no process group.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rethinking_bn.population import estimate_population_statistics
from rethinking_bn.shuffle import exchange as row_exchange
from tests.helpers import run_distributed
from tests.modeling.roi_cases import (
    CASCADE,
    SHUFFLED,
    call,
    gradients,
    make_head,
    mask_config,
    norms,
    permutation,
    roi_inputs,
    rois,
    written_out,
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


def cases(world: int) -> list[tuple[str, dict[str, Any], list[tuple[int, ...]]]]:
    return [(kind, options, ROWS[world][n]) for kind, options, n in CASES if n < len(ROWS[world])]


def shares(total: int, parts: int) -> list[int]:
    return [(i + 1) * total // parts - i * total // parts for i in range(parts)]


def loss(out: Tensor, rows: slice) -> Tensor:
    """A loss of a part of all rows, with another gradient for each number of each row."""
    weights = torch.arange(1, 10_000, dtype=torch.float64)
    return (
        sum(  # type: ignore[return-value]
            ((out[i].flatten() * weights[: out[i].numel()]).sin() * (row + 1)).sum()
            for i, row in enumerate(range(rows.start, rows.stop))
        )
        + 0 * out.sum()
    )


def _run_cases(rank: int) -> list[dict[str, Any]]:
    results = []
    for kind, options, rows in cases(dist.get_world_size()):
        head = make_head(kind, **options)
        if options.get("shuffled"):
            head.set_iteration(RUN_SEED, ITERATION)
        first = sum(sum(images) for images in rows[:rank])
        mine = slice(first, first + sum(rows[rank]))
        x = rois(sum(map(sum, rows)))[mine].clone().requires_grad_()
        with (
            mock.patch.object(
                row_exchange, "all_to_all_rows", wraps=row_exchange.all_to_all_rows
            ) as exchange,
            head.image_rows(rows[rank]),
        ):
            out = call(head, x)
            loss(out, mine).backward()
        sent = [
            (len(packed), packed[:1].nbytes, sum(received))
            for _, (_, packed, received, *_), _ in exchange.mock_calls
        ]
        results.append(
            {
                "out": out.detach(),
                "grad": x.grad,
                "gradients": gradients(head),
                "running": [
                    (conv.norm.running_mean, conv.norm.running_var) for conv in head.conv_norm_relus
                ],
                "sent": sent,
            }
        )
    return results


@cache
def results(world: int) -> list[list[dict[str, Any]]]:
    return run_distributed(_run_cases, world)


def reference(kind: str, options: dict[str, Any], rows: list[tuple[int, ...]]) -> dict[str, Any]:
    """Return what all ranks together must compute; "groups" are the normalised row counts."""
    head, world = make_head(kind, **plain(options)), len(rows)
    total = sum(map(sum, rows))
    if options.get("shuffled"):
        order = permutation(make_head(kind, **options), total, RUN_SEED, ITERATION)
        k = options.get("norm_images", 0)
        parts = len(rows[0]) // k if k else 1
        groups = [shares(share, parts) for share in shares(total, world)]
    else:
        order, groups = torch.arange(total), [[total]]
    x = rois(total).requires_grad_()
    flat = [size for of_rank in groups for size in of_rank]
    shuffled, _ = written_out(head, x[order], flat)
    out = shuffled[order.argsort()]
    loss(out, slice(0, total)).backward()
    return {"head": head, "out": out, "x": x, "order": order, "groups": groups}


@pytest.mark.parametrize("world", [2, 3])
def test_equals_one_process_that_normalises_the_same_groups(world: int) -> None:
    for number, (kind, options, rows) in enumerate(cases(world)):
        expected = reference(kind, options, rows)
        ranks = [of_rank[number] for of_rank in results(world)]
        where = f"{kind} {options} {rows}"
        torch.testing.assert_close(torch.cat([r["out"] for r in ranks]), expected["out"], msg=where)
        torch.testing.assert_close(
            torch.cat([r["grad"] for r in ranks]), expected["x"].grad, msg=where
        )
        for name, gradient in gradients(expected["head"]).items():
            summed = sum(r["gradients"][name] for r in ranks)
            torch.testing.assert_close(summed, gradient, msg=f"{where} {name}")
        # every rank's moving averages follow what it normalised
        start, shuffled = 0, rois(sum(map(sum, rows)))[expected["order"]]
        for rank, of_rank in enumerate(expected["groups"]):
            share = shuffled[start : start + sum(of_rank)]
            start += sum(of_rank)
            _, running = written_out(make_head(kind, **plain(options)), share, of_rank)
            torch.testing.assert_close(ranks[rank]["running"], running, msg=where)
        if len(expected["groups"]) == 1:  # SyncBN: one group, on all ranks
            assert all(str(r["running"]) == str(ranks[0]["running"]) for r in ranks)


def plain(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k not in ("shuffled", "norm_images", "conv_norm")}


@pytest.mark.parametrize("world", [2, 3])
def test_each_row_travels_once_and_returns_as_small_as_it_gets(world: int) -> None:
    """Defect 10: rows are shared equally, not padded, not sent to everybody."""
    for number, (kind, options, rows) in enumerate(cases(world)):
        ranks = [of_rank[number]["sent"] for of_rank in results(world)]
        if not options.get("shuffled"):
            assert not any(ranks)
            continue
        total = sum(map(sum, rows))
        if kind == "box":
            numbers = 6 if options.get("fc_dims", [6]) else 8 * 9
        else:
            # logits are 2·6·6 numbers, the last normalised map 8·3·3; of equal ones the later; of
            # 20·6·6 and 4·3·3 the latter
            numbers = 2 * 36 if "num_classes" not in options else 4 * 9
        for rank, sent in enumerate(ranks):
            held, share = sum(rows[rank]), shares(total, world)[rank]
            there, back, back_gradient, there_gradient = sent
            assert there[0] <= held and there[2] <= share
            # a row that arrived returns, and so do the gradients
            assert (back[0], back[2]) == (there[2], there[0])
            assert (back_gradient[0], there_gradient[0]) == (there[0], there[2])
            for exchange, width in ((there, 36), (back, numbers)):
                assert exchange[0] == 0 or exchange[1] == 8 * width


def _population(rank: int) -> list[tuple[Tensor, Tensor]]:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = make_head("box", shuffled=True)

        def forward(self, rows: tuple[int, ...]) -> Tensor:
            first = sum(rows[:rank])
            return self.head(rois(sum(rows), seed=len(rows))[first : first + rows[rank]])

    model = Model()
    batches = [(4, 5), (0, 3)]
    estimate_population_statistics(model, batches, 2, seed=RUN_SEED, progress=False)
    return [(c.norm.running_mean, c.norm.running_var) for c in model.head.conv_norm_relus]


def test_population_training_of_shuffled_rows() -> None:
    ranks = run_distributed(_population, 2)
    head = make_head("box", shuffled=True)
    inputs: list[list[Tensor]] = [[], []]
    for index, counts in enumerate([(4, 5), (0, 3)]):
        x = rois(sum(counts), seed=len(counts))
        x = x[permutation(head, len(x), RUN_SEED, index)]
        for seen, conv in zip(inputs, head.conv_norm_relus, strict=True):
            x = nn.functional.conv2d(x, conv.weight, padding=1)
            seen.append(x)
            affine = conv.norm.weight, conv.norm.bias
            x = torch.cat(
                [
                    nn.functional.batch_norm(part, None, None, *affine, training=True)
                    for part in x.split(shares(len(x), 2))
                ]
            ).relu()
    for layer, seen in enumerate(inputs):
        values = torch.cat(seen).transpose(0, 1).flatten(1)
        for statistics in ranks:
            torch.testing.assert_close(statistics[layer][0], values.mean(1))
            torch.testing.assert_close(statistics[layer][1], values.var(1))


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
