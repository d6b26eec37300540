"""Seeds derived from integers, the announcement of iterations, and recomputed forwards."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from rethinking_bn.randomness import (
    Forwards,
    IterationAware,
    announce_iteration,
    derive_seed,
    mark_of,
)


def test_seeds_differ_with_every_argument_and_their_order() -> None:
    keys = [(), (0,), (1,), (-1,), (0, 0), (0, 1), (1, 0), (1, 1), (11,), (2**80,), (1, 2, 3)]
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    neighbours = [derive_seed(7, iteration, 0) % 2**32 for iteration in range(10_000)]
    assert len(set(neighbours)) > 9_990
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


def test_a_recomputed_forward_is_told_by_the_nearest_mark() -> None:
    forwards: Forwards[str] = Forwards()
    for name, value in (("a", 1.0), ("b", 2.0), ("c", math.inf), ("d", math.nan)):
        forwards.remember(torch.tensor([0.5, value]), name)
    forwards.remember(torch.zeros(3), "another shape")
    for name, value in (("b", 2.0 + 1e-6), ("a", 1.0), ("c", math.inf), ("a", 0.9)):
        assert forwards.find(torch.tensor([0.5, value])) == name
    assert forwards.find(torch.zeros(4)) is None
    assert forwards.find(torch.zeros(3)) == "another shape"


@pytest.mark.parametrize("newest_first", [False, True])
def test_equal_marks_are_taken_in_turn(newest_first: bool) -> None:
    forwards: Forwards[int] = Forwards(newest_first=newest_first)
    mark = torch.ones(2)
    for number in range(3):
        forwards.remember(mark, number)
    order = [2, 1, 0] if newest_first else [0, 1, 2]
    assert [forwards.find(mark) for _ in range(6)] == order + order
    forwards.remember(mark, 3)
    assert forwards.find(mark) == 3  # the others were recomputed already


def test_forwards_are_bounded_and_copies_are_empty() -> None:
    forwards: Forwards[int] = Forwards()
    for number in range(100):
        forwards.remember(torch.full((1,), float(number)), number)
    assert forwards.find(torch.zeros(1)) == 36  # the oldest of 64
    for other in (copy.deepcopy(forwards), pickle.loads(pickle.dumps(forwards))):
        assert other.find(torch.zeros(1)) is None


def test_marks_tell_inputs_apart_whatever_their_strides() -> None:
    x = torch.randn(40, 5, 33, 20)
    assert torch.equal(mark_of(x), mark_of(x.to(memory_format=torch.channels_last)))
    assert 16 <= len(mark_of(x)) < 32 and len(mark_of(x[:0])) == 0
    assert not torch.equal(mark_of(x), mark_of(x.flip(0)))
