"""The EMA's momentum: moving averages of every pace against exact statistics, along a training.

A moving average is late by about 1/momentum steps, and as noisy as a mean over 2/momentum batches.
With large batches weights move far in few steps and what matters is the delay; with small batches
and a small network the noise does. No momentum is right for all of a training; exact statistics
need none. The running statistics have no part in the training, so one training serves every
momentum: its layers keep the last batch's statistics (momentum 1), and the averages are taken here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rethinking_bn.layers import BatchNorm2d
from studies.data import CAMERAS, QUICK_CAMERAS, Digits, load_digits, shuffled_indices
from studies.study import Claim, Panel, Point, Series, Settings, Study, Values
from studies.training import error, make_net, precise, train

_MOMENTA = (0.01, 0.05, 0.1, 0.2, 0.5)
_WATCHED = (0.25, 0.5, 1.0)  # of the training
_BATCHES = {"large": "Batches of 500", "small": "Batches of 32"}
_ARMS = (*(f"EMA {momentum}" for momentum in _MOMENTA), "exact")


def run(settings: Settings, seed: int, device: torch.device) -> Iterator[Values]:
    """Yield once per batch size."""
    digits = load_digits(device, seed, settings["conditions"])
    for arm in _BATCHES:
        yield dict(_train(settings, digits, seed, arm))


def _train(settings: Settings, digits: Digits, seed: int, arm: str) -> Iterator[tuple[str, float]]:
    torch.manual_seed(seed)
    net = make_net().to(digits.train.images.device)
    layers = [layer for layer in net.modules() if isinstance(layer, BatchNorm2d)]
    averages = {momentum: _statistics(layers) for momentum in _MOMENTA}
    for layer in layers:
        layer.momentum = 1.0
    number, size = len(digits.train.labels), settings[f"{arm}_batch"]
    steps = settings["epochs"] * number // size
    watched = {max(1, round(part * steps)): part for part in _WATCHED}
    batches = shuffled_indices(number, size, seed)
    lr = settings["lr_per_sample"] * size
    for done in train(net, digits.train, batches, steps=steps, lr=lr):
        last = _statistics(layers)
        for momentum, average in averages.items():
            torch._foreach_lerp_(average, last, momentum)
        if done in watched:
            for momentum, average in averages.items():
                _set(layers, average)
                yield _key(arm, f"EMA {momentum}", watched[done]), error(net, digits.test)
            precise(net, digits.train.images, settings["population_batch"])
            yield _key(arm, "exact", watched[done]), error(net, digits.test)


def _statistics(layers: list[BatchNorm2d]) -> list[Tensor]:
    return [value.clone() for layer in layers for value in _buffers(layer)]


def _set(layers: list[BatchNorm2d], values: list[Tensor]) -> None:
    buffers = [buffer for layer in layers for buffer in _buffers(layer)]
    torch._foreach_copy_(buffers, values)


def _buffers(layer: nn.Module) -> list[Tensor]:
    buffers = dict(layer.named_buffers())
    return [buffers["running_mean"], buffers["running_var"]]


def _key(arm: str, statistics: str, part: float) -> str:
    return f"{arm}, {statistics}, {part:.0%}"


_NAMED = (
    *(
        (f"large batches, a quarter into the training: exact beat momentum {m}", "large", 0.25, m)
        for m in _MOMENTA
    ),
    ("small batches, half-way: exact beat momentum 0.5, which is noise", "small", 0.5, 0.5),
    ("at the end momentum 0.1 does as well as exact ones", "small", 1.0, 0.1),
)

STUDY = Study(
    name="ema-momentum",
    title="The momentum of moving averages against exact statistics",
    source="Section 3 and its figures",
    panels=[
        Panel(
            title,
            "of the training",
            [
                Series(name, [Point(_key(arm, name, part), f"{part:.0%}") for part in _WATCHED])
                for name in _ARMS
            ],
        )
        for arm, title in _BATCHES.items()
    ],
    claims=[
        Claim(text, _key(arm, "exact", part), _key(arm, f"EMA {m}", part), similar=part == 1.0)
        for text, arm, part, m in _NAMED
    ],
    settings={
        "epochs": 10,
        "large_batch": 500,
        "small_batch": 32,
        "lr_per_sample": 0.02 / 32,
        "population_batch": 500,
        "conditions": CAMERAS,
    },
    quick={"epochs": 2, "large_batch": 200, "small_batch": 200, "conditions": QUICK_CAMERAS},
    run=run,
)
