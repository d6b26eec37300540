"""`leakage` on several processes: samples of one class on each, and the cure (Table 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rethinking_bn.distributed import data_parallel, get_rank
from rethinking_bn.layers import BatchNorm2d, SyncBatchNorm2d, shuffle_rows, unshuffle_rows
from rethinking_bn.population import estimate_population_statistics
from rethinking_bn.randomness import derive_seed
from studies.data import load_digits, patterned_indices
from studies.network import make_net
from studies.study import Settings
from studies.training import error, train_to_the_end

WORLD, ROWS = 4, 16  # processes; samples of one class on each


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


def train_on_processes(device: torch.device, settings: Settings, seed: int, arm: str) -> float:
    """Train on this process's share; return rank 0's error in % by population statistics.

    Args:
        arm: "BN", "BN + shuffle" or "SyncBN".
    """
    digits = load_digits(device, seed, settings["conditions"])
    torch.manual_seed(seed)
    net: nn.Module = make_net(SyncBatchNorm2d if arm == "SyncBN" else BatchNorm2d)
    net = ShuffledNet(net, seed) if arm == "BN + shuffle" else net
    batches = patterned_indices(digits.train.labels, 1, 1, ROWS, derive_seed(seed, get_rank()))
    parallel = data_parallel(net)
    label = f"{WORLD} processes, {arm}" if get_rank() == 0 else None
    steps, lr, count = settings["process_steps"], settings["lr"], settings["population_batches"]
    train_to_the_end(parallel, digits.train, batches, steps=steps, lr=lr, label=label)
    images = (digits.train.images[batch] for batch in batches)
    estimate_population_statistics(net, images, count, labelled=True, progress=False)
    return error(net, digits.test) if get_rank() == 0 else 0.0  # all networks are the same
