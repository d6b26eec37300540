"""Seeds derived from integers, and the announcement of iterations."""

from __future__ import annotations

from torch import nn

from rethinking_bn.randomness import IterationAware, announce_iteration, derive_seed


def test_seeds_differ_with_every_argument_and_their_order() -> None:
    keys = [(), (0,), (1,), (-1,), (0, 0), (0, 1), (1, 0), (1, 1), (11,), (2**80,), (1, 2, 3)]
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    neighbours = [derive_seed(7, iteration, 0) % 2**32 for iteration in range(10_000)]
    assert len(set(neighbours)) > 9_990


def test_seeds_are_the_same_in_every_process() -> None:
    # a checkpoint resumed by a later version must draw the same numbers
    assert derive_seed(7, 3, 1) == 4790261242039544937
    assert derive_seed() == 8238016292129134938


class Aware(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[int, int]] = []

    def set_iteration(self, run_seed: int, iteration: int) -> None:
        self.heard.append((run_seed, iteration))


def test_modules_that_want_to_know_are_told_wherever_they_are() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(Aware()), Aware())
    announce_iteration(model, 5, 9)
    aware = [module for module in model.modules() if isinstance(module, Aware)]
    assert [module.heard for module in aware] == [[(5, 9)], [(5, 9)]]
    assert all(isinstance(module, IterationAware) for module in aware)
    assert not isinstance(model[0], IterationAware)
