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

from rethinking_bn.averaging import AveragedWeights
from studies.data import CAMERAS, QUICK_CAMERAS, Digits, load_digits, shuffled_indices
from studies.study import Claim, Panel, Point, Series, Settings, Study, Values
from studies.training import Schedule, constant_rate, error, learning_rate, make_net, precise, train

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
    steps, images = settings["steps"], digits.train.images
    batches = shuffled_indices(len(images), settings["batch_size"], seed)
    options = {"lr": settings["lr"], "schedule": _SCHEDULES[schedule]}
    for done in train(net, digits.train, batches, steps=steps, **options):
        for (name, _), averaged in averages.items():
            if name == "EMA" or done > settings["swa_start"] * steps:
                averaged.update(net)
    size = settings["population_batch"]
    full = [batch for batch in images.split(size) if len(batch) == size]
    for (name, statistics), averaged in averages.items():
        if statistics == "estimate":
            averaged.estimate_statistics(full, len(full), labelled=True, progress=False)
        yield f"{schedule}, {name}, {statistics}", error(averaged.module, digits.test)
    yield f"{schedule}, last, copy", error(net, digits.test)
    precise(net, images, size)
    yield f"{schedule}, last, estimate", error(net, digits.test)


def _series(schedule: str, name: str) -> Series:
    """Return one kind of weights; the last have no statistics averaged along."""
    ways = [way for way in _STATISTICS if (name, way) != ("last", "average")]
    points = [Point(f"{schedule}, {name}, {way}", way) for way in ways]
    return Series(f"{name} weights" if name == "last" else name, points)


STUDY = Study(
    name="averaging",
    title="Averaged weights and their statistics",
    source="SWA (arXiv 1803.05407) and section 3",
    panels=[
        Panel(
            f"{schedule} learning rate",
            "statistics",
            [_series(schedule, name) for name in (*_KINDS, "last")],
            ordered=False,
        )
        for schedule in _SCHEDULES
    ],
    claims=[
        Claim(f"constant rate, {name}: {text}", f"constant, {low}", f"constant, {high}")
        for name in _KINDS
        for text, low, high in (
            ("estimated beat copied ones", f"{name}, estimate", f"{name}, copy"),
            ("estimated beat averaged ones", f"{name}, estimate", f"{name}, average"),
            ("beats the last weights, all estimated", f"{name}, estimate", "last, estimate"),
        )
    ],
    settings={
        "steps": 300,
        "batch_size": 32,
        "lr": 0.05,
        "decay": 0.99,
        "swa_start": 0.5,  # of the training
        "population_batch": 100,
        "conditions": CAMERAS,
    },
    quick={"steps": 8, "conditions": QUICK_CAMERAS},
    run=run,
)
