"""Information leakage: mini-batches with a pattern, and its cure (section 6).

BatchNorm shows every sample the others of its mini-batch. Where those tell something about it,
training learns to read that, and inference by population statistics, where it is missing, fails.
The paper's toy has 16 of 1000 classes, 2 samples each. A digit is told from its image alone, and
most classes are in every batch: "8 classes x 2" gives away too little here for training to rely on
it, and population statistics do best. "1 class x 16" is nearer to Mask R-CNN's heads (Table 6),
where all that a GPU normalises is of one kind. The cure is tried on four gloo processes with 16
samples of one class each: rows shuffled over the processes, or SyncBN.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rethinking_bn.benchmarks.processes import run_processes
from rethinking_bn.distributed import get_rank
from rethinking_bn.layers import BatchNorm2d, SyncBatchNorm2d, shuffle_rows, unshuffle_rows
from rethinking_bn.population import estimate_population_statistics
from rethinking_bn.seeding import derive_seed

from .data import load_digits, patterned_indices, shuffled_indices
from .study import Claim, Panel, Point, Series, Settings, Study, Values
from .training import error, make_net, mini_batch_error, train_to_the_end

_TOY = "8 classes x 2"
_PATTERNS = {_TOY: (8, 2), "1 class x 16": (1, 16), "random": None}
_NBS, _WORLD = 16, 4  # samples per group, groups per training batch: one per process
# Figure 8, read off: error in % at epoch 100. Table 6: box AP of heads at one image per GPU.
_FIGURE_8 = (("same pattern", 23.0), ("random mini-batches", 31.0), ("population", 51.0))
_TABLE_6 = {"BN": 30.7, "BN + shuffle": 41.7, "SyncBN": 41.7}


def _of_table_6(arm: str) -> str:
    return f"{_WORLD} processes, {arm}"


def run(settings: Settings, seed: int, device: torch.device) -> Iterator[Values]:
    """Yield once per pattern in one process, then once per arm on several."""
    for arm in _PATTERNS:
        yield _figure_8(settings, seed, device, arm)
    for arm in _TABLE_6:
        # on the CPU also with --device cuda: few machines have four GPUs
        errors = run_processes(_table_6, _WORLD, settings, seed, arm, timeout=600)
        yield {_of_table_6(arm): errors[0]}


def _batches(labels: Tensor, arm: str, groups: int, seed: int) -> Iterator[Tensor]:
    pattern = _PATTERNS[arm]
    if pattern is None:
        return shuffled_indices(len(labels), groups * _NBS, seed)
    return patterned_indices(labels, groups, *pattern, seed)


def _figure_8(settings: Settings, seed: int, device: torch.device, arm: str) -> Values:
    digits = load_digits(device)
    torch.manual_seed(seed)
    net = make_net().to(device)
    batches = _batches(digits.train.labels, arm, _WORLD, seed)
    steps, lr, count = settings["steps"], settings["lr"], settings["groups"]
    train_to_the_end(net, digits.train, batches, steps=steps, lr=lr, nbs=_NBS, label=arm)
    seen = islice(_batches(digits.train.labels, arm, 1, seed + 1), count)  # as training saw them
    images = (digits.train.images[group] for group in seen)
    estimate_population_statistics(net, images, count, labelled=True, progress=False)
    tested = {f"{arm}, population": error(net, digits.test)}
    for way, pattern in (("same pattern", arm), ("random mini-batches", "random")):
        groups = islice(_batches(digits.test.labels, pattern, 1, seed), count)
        tested[f"{arm}, {way}"] = mini_batch_error(net, digits.test, groups)
    return tested


class _Shuffled(nn.Module):
    """Runs ``net`` on rows permuted over all processes in training."""

    def __init__(self, net: nn.Module, seed: int) -> None:
        super().__init__()
        self.net, self.seed, self.calls = net, seed, 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.net(x)
        self.calls += 1
        rows, state = shuffle_rows(x, generator_seed=derive_seed(self.seed, self.calls))
        return unshuffle_rows(self.net(rows), state)


def _table_6(device: torch.device, settings: Settings, seed: int, arm: str) -> float:
    """Train on this process's share; return the error in % by population statistics."""
    digits = load_digits(device)
    torch.manual_seed(seed)
    net: nn.Module = make_net(SyncBatchNorm2d if arm == "SyncBN" else BatchNorm2d)
    net = _Shuffled(net, seed) if arm == "BN + shuffle" else net
    rank_seed = derive_seed(seed, get_rank())
    batches = _batches(digits.train.labels, "1 class x 16", 1, rank_seed)
    parallel = DistributedDataParallel(net, broadcast_buffers=False)
    label = _of_table_6(arm) if get_rank() == 0 else None
    steps, lr, count = settings["steps"], settings["lr"], settings["groups"] // _WORLD
    train_to_the_end(parallel, digits.train, batches, steps=steps, lr=lr, label=label)
    images = (digits.train.images[group] for group in islice(batches, count))
    estimate_population_statistics(net, images, count, labelled=True, progress=False)
    return error(net, digits.test)


STUDY = Study(
    name="leakage",
    title="What a mini-batch gives away",
    source="Figure 8 and Table 6",
    panels=(
        Panel(
            "Trained on patterned mini-batches",
            "statistics at inference",
            "error (%)",
            [
                Series(a, [Point(f"{a}, {x}", x, v if a == _TOY else None) for x, v in _FIGURE_8])
                for a in _PATTERNS
            ],
            "Figure 8",
        ),
        Panel(
            "One class per process, four processes",
            "normalisation in training",
            "error (%)",
            [Series("", [Point(_of_table_6(a), a, v) for a, v in _TABLE_6.items()])],
            "Table 6",
            "box AP",
        ),
    ),
    claims=(
        *(
            Claim(f"{arm}: {text}", low=f"{arm}, same pattern", high=f"{arm}, {way}")
            for arm in (_TOY, "1 class x 16")
            for text, way in (
                ("random mini-batches are worse than patterned", "random mini-batches"),
                ("population statistics are worse than patterned", "population"),
            )
        ),
        Claim("shuffling cures it", low=_of_table_6("BN + shuffle"), high=_of_table_6("BN")),
        Claim("SyncBN cures it", low=_of_table_6("SyncBN"), high=_of_table_6("BN")),
    ),
    settings={"steps": 400, "lr": 0.1, "groups": 200},
    quick={"steps": 20, "lr": 0.1, "groups": 40},
    parts=len(_PATTERNS) + len(_TABLE_6),
    run=run,
)
