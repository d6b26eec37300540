"""Averaged weights: EMA and SWA beside the last weights, under three kinds of statistics.

The statistics of a training belong to the weights of that training, not to their average. What is
compared: those of the last model ("copy"), the moving averages averaged along as the weights are
("average"), and those estimated for the averaged model ("estimate").

At a constant learning rate, as SWA has it, averaging is worth most; at the end of half a cosine,
where the weights hardly move any more, there is little to average.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rethinking_bn.averaging import AveragedWeights
from studies.data import Digits, load_digits, shuffled_indices
from studies.network import make_net
from studies.study import Claim, Panel, Point, Series, Settings, Study, Values
from studies.training import (
    Schedule,
    constant_rate,
    error,
    learning_rate,
    precise,
    train,
)

_SCHEDULES: Mapping[str, Schedule] = {"constant": constant_rate, "cosine": learning_rate}
_STATISTICS: tuple[Any, ...] = ("average", "copy", "estimate")
_KINDS: Mapping[str, Any] = {"EMA": "ema", "SWA": "swa"}


def run(settings: Settings, seed: int, device: torch.device) -> Iterator[Values]:
    """Yield once per learning rate schedule."""
    digits = load_digits(device, seed, settings["conditions"])
    for schedule in _SCHEDULES:
        yield dict(_train(settings, digits, seed, schedule))


def _train(
    settings: Settings, digits: Digits, seed: int, schedule: str
) -> Iterator[tuple[str, float]]:
    torch.manual_seed(seed)
    net = make_net().to(digits.train.images.device)
    averages = {
        (name, statistics): AveragedWeights(
            net, kind, decay=settings["decay"], statistics=statistics
        )
        for name, kind in _KINDS.items()
        for statistics in _STATISTICS
    }
    steps, size = settings["steps"], settings["batch_size"]
    for done in train(
        net,
        digits.train,
        shuffled_indices(len(digits.train.labels), size, seed),
        steps=steps,
        lr=settings["lr"],
        label=f"{schedule} rate",
        schedule=_SCHEDULES[schedule],
    ):
        for (name, _), averaged in averages.items():
            if name == "EMA" or done > settings["swa_start"] * steps:
                averaged.update(net)
    images = digits.train.images
    for (name, statistics), averaged in averages.items():
        if statistics == "estimate":
            batches = _full_batches(images, settings["population_batch"])
            averaged.estimate_statistics(batches, len(batches), labelled=True, progress=False)
        yield f"{schedule}, {name}, {statistics}", error(averaged.module, digits.test)
    yield f"{schedule}, last, copy", error(net, digits.test)
    precise(net, images, settings["population_batch"])
    yield f"{schedule}, last, estimate", error(net, digits.test)


def _full_batches(images: Tensor, size: int) -> list[Tensor]:
    return [batch for batch in images.split(size) if len(batch) == size]


def _panel(schedule: str) -> Panel:
    """Return the axes of one schedule; the last weights have no statistics averaged along."""
    return Panel(
        f"{schedule} learning rate",
        "statistics",
        "error (%)",
        [
            Series(
                f"{name} weights" if name == "last" else name,
                [
                    Point(f"{schedule}, {name}, {statistics}", statistics)
                    for statistics in _STATISTICS
                    if (name, statistics) != ("last", "average")
                ],
            )
            for name in (*_KINDS, "last")
        ],
        ordered=False,
    )


_SETTINGS = {
    "steps": 300,
    "batch_size": 32,
    "lr": 0.05,
    "decay": 0.99,
    "swa_start": 0.5,  # of the training
    "population_batch": 100,
    "conditions": {"copies": 2, "contrast": 0.1, "brightness": 2.0},
}

STUDY = Study(
    name="averaging",
    title="Averaged weights and their statistics",
    source="SWA (arXiv 1803.05407) and section 3",
    panels=tuple(_panel(schedule) for schedule in _SCHEDULES),
    claims=tuple(
        Claim(f"constant rate, {name}: {text}", low=f"constant, {low}", high=f"constant, {high}")
        for name in _KINDS
        for text, low, high in (
            ("estimated beat copied ones", f"{name}, estimate", f"{name}, copy"),
            ("estimated beat averaged ones", f"{name}, estimate", f"{name}, average"),
            ("beats the last weights, all estimated", f"{name}, estimate", "last, estimate"),
        )
    ),
    settings=_SETTINGS,
    quick={
        **_SETTINGS,
        "steps": 8,
        "conditions": {"copies": 1, "contrast": 0.1, "brightness": 2.0},
    },
    parts=len(_SCHEDULES),
    run=run,
)
