"""Information leakage: mini-batches with a pattern, and its cure (section 6).

BatchNorm shows every sample the others of its mini-batch. Where those tell something about it,
training learns to read that, and inference by population statistics, where it is missing, fails.

The paper's toy has 16 of 1000 classes, two samples each. Here two of ten classes, two samples
each, come nearest: a sample's classmate is one of three others. The digits are noisy, so that the
image alone leaves doubt. One class a batch is nearer to Mask R-CNN's heads (Table 6), where all
that a GPU normalises is of one image; there the cure is tried, on four processes each of which
draws the class of its samples. All ways to evaluate a network see the same test samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from machine.processes import run_processes
from rethinking_bn.distributed import data_parallel, get_rank
from rethinking_bn.layers import BatchNorm2d, SyncBatchNorm2d, shuffle_rows, unshuffle_rows
from rethinking_bn.population import estimate_population_statistics
from rethinking_bn.randomness import derive_seed
from studies.data import load_digits, patterned_indices, shuffled_indices
from studies.study import Claim, Panel, Point, Series, Settings, Study, Values
from studies.training import (
    error,
    make_net,
    mini_batch_error,
    normalised_in_groups,
    train_to_the_end,
)

_WORLD, _ROWS = 4, 16  # processes; samples of one class on each
_TOY, _ONE = "2 classes x 2", f"1 class x {_ROWS}"
_PATTERNS = {_TOY: (2, 2), _ONE: (1, _ROWS), "no pattern": None}
_BATCH = 64  # samples of a training batch
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
        errors = run_processes(_train_on_processes, _WORLD, settings, seed, arm, timeout=600)
        yield {_of_table_6(arm): errors[0]}


def _nbs(arm: str) -> int:
    classes, per_class = _PATTERNS[arm] or (2, 2)
    return classes * per_class


def _batches(labels: Tensor, arm: str, samples: int, seed: int) -> Iterator[Tensor]:
    pattern = _PATTERNS[arm]
    if pattern is None:
        return shuffled_indices(len(labels), samples, seed)
    return patterned_indices(labels, samples // _nbs(arm), *pattern, seed)


def _figure_8(settings: Settings, seed: int, device: torch.device, arm: str) -> Values:
    digits = load_digits(device, seed, settings["conditions"])
    torch.manual_seed(seed)
    net, nbs = make_net().to(device), _nbs(arm)
    batches = _batches(digits.train.labels, arm, _BATCH, seed)
    steps, lr = settings["steps"], settings["lr"]
    train_to_the_end(net, digits.train, batches, steps=steps, lr=lr, nbs=nbs)
    images = (digits.train.images[batch] for batch in batches)  # as training saw them
    with normalised_in_groups(net, _BATCH, nbs):
        count = settings["population_batches"]
        estimate_population_statistics(net, images, count, labelled=True, progress=False)
    labels = digits.test.labels
    drawn = next(_batches(labels, arm, len(labels) // _BATCH * _BATCH, seed))
    seen = digits.test.take(drawn)
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))
    return {
        f"{arm}, population": error(net, seen),
        f"{arm}, same pattern": mini_batch_error(net, seen, nbs),
        f"{arm}, random mini-batches": mini_batch_error(net, seen.take(order), nbs),
    }


class ShuffledNet(nn.Module):
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


def _train_on_processes(device: torch.device, settings: Settings, seed: int, arm: str) -> float:
    """Train on this process's share; return rank 0's error in % by population statistics.

    Args:
        arm: "BN", "BN + shuffle" or "SyncBN".
    """
    digits = load_digits(device, seed, settings["conditions"])
    torch.manual_seed(seed)
    net: nn.Module = make_net(SyncBatchNorm2d if arm == "SyncBN" else BatchNorm2d)
    net = ShuffledNet(net, seed) if arm == "BN + shuffle" else net
    batches = patterned_indices(digits.train.labels, 1, 1, _ROWS, derive_seed(seed, get_rank()))
    parallel = data_parallel(net)
    label = "training" if get_rank() == 0 else None
    steps, lr, count = settings["process_steps"], settings["lr"], settings["population_batches"]
    train_to_the_end(parallel, digits.train, batches, steps=steps, lr=lr, label=label)
    images = (digits.train.images[batch] for batch in batches)
    estimate_population_statistics(net, images, count, labelled=True, progress=False)
    return error(net, digits.test) if get_rank() == 0 else 0.0  # all networks are the same


def _panel_8(arm: str) -> Series:
    points = [Point(f"{arm}, {x}", x, v if arm == _TOY else None) for x, v in _FIGURE_8]
    return Series(arm, points)


STUDY = Study(
    name="leakage",
    title="What a mini-batch gives away",
    source="Figure 8 and Table 6",
    panels=[
        Panel(
            "Trained on patterned mini-batches",
            "statistics at inference",
            [_panel_8(arm) for arm in _PATTERNS],
            "Figure 8",
            ordered=False,
        ),
        Panel(
            "One class per process, four processes",
            "normalisation in training",
            [Series("", [Point(_of_table_6(a), a, v) for a, v in _TABLE_6.items()])],
            "Table 6",
            "box AP",
            ordered=False,
        ),
    ],
    claims=[
        *(
            Claim(f"{arm}: {way} are worse than patterned", f"{arm}, same pattern", f"{arm}, {key}")
            for arm in (_TOY, _ONE)
            for way, key in (
                ("random mini-batches", "random mini-batches"),
                ("population statistics", "population"),
            )
        ),
        Claim("shuffling cures it", low=_of_table_6("BN + shuffle"), high=_of_table_6("BN")),
        Claim("SyncBN cures it", low=_of_table_6("SyncBN"), high=_of_table_6("BN")),
    ],
    settings={
        "steps": 600,
        "process_steps": 250,  # on several processes
        "lr": 0.1,
        "population_batches": 50,
        "conditions": {"copies": 20, "noise": 0.6},
    },
    quick={
        "steps": 8,
        "process_steps": 8,
        "population_batches": 4,
        "conditions": {"copies": 1, "noise": 0.6},
    },
    run=run,
    seeds=2,
)
