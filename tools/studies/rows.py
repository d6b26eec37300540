"""Table 5: which levels of RetinaNet's head share statistics and affine (section 5).

torchvision's RetinaNet on the generated shapes, small and trained from scratch. Rows that differ
only in population statistics share their training: rows 2, 4 and 5 are population training of the
networks of rows 1, 3 and 6. Every row's population statistics are estimated on the same batches.

By default one head is trained, that of a BatchNorm layer which is called level after level, and
evaluated by its moving averages, by exact statistics that the levels share (row 3), and by exact
statistics of each level (row 4): the same weights. The paper's training sees 500 times as many
images.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from rethinking_bn.data import ShapesDataset
from rethinking_bn.layers.multi_domain import TABLE_5
from rethinking_bn.population import estimate_population_statistics
from rethinking_bn.torchvision import run_detector
from studies.detection import batches, box_ap, make_detector, train_detector
from studies.study import Claim, Panel, Part, Point, Series, Settings, Study, Values

# The paper's AP.
_PAPER = {"row 1": 39.1, "row 2": 2.1, "row 3": 34.1, "row 4": 39.1, "row 5": 35.5, "row 6": 39.2}
_EMA = "row 3, EMA"  # by moving averages, as a BatchNorm layer that is called level after level
_AGREE = ("row 1", "row 4", "row 6")  # in training and inference a level sees the same batch
_DISAGREE = ("row 2", "row 3", "row 5")
_OTHERS = {"GN": 39.5, "no norm": 38.7}
# what each training gives; the first row is trained
_TRAININGS = (
    (_EMA, "row 3", "row 4"),
    ("row 1", "row 2"),
    ("row 6", "row 5"),
    *((label,) for label in _OTHERS),
)


def choices_of(row: str) -> dict[str, Any]:
    """Return the choices of a row of Table 5, by its key."""
    return dict(TABLE_5[int(row.removeprefix("row ").removesuffix(", EMA"))])


def _label(row: str) -> str:
    letters = "/".join(choice[0].upper() for choice in choices_of(row).values())
    return f"{row}: {letters}"


def _detector(key: str) -> nn.Module:
    if key in _OTHERS:
        return make_detector("GN" if key == "GN" else "")
    return make_detector("BN", **choices_of(key))


def run(settings: Settings, seed: int, device: torch.device) -> Iterator[Part]:
    """Yield a part for each training: rows that share weights together, GN and none."""
    for keys in _TRAININGS:
        yield Part(keys, partial(_train, settings, seed, device, keys))


def _train(
    settings: Settings, seed: int, device: torch.device, keys: Sequence[str]
) -> Iterator[Values]:
    train = ShapesDataset("shapes_train", num_images=settings["train_images"], in_memory=True)
    val = ShapesDataset("shapes_val", num_images=settings["val_images"], in_memory=True)
    torch.manual_seed(seed)
    model = _detector(keys[0]).to(device)
    train_detector(model, train, settings, seed)
    weights = copy.deepcopy(model.state_dict())
    for key in keys:
        if key.startswith("row") and key != _EMA:
            model = _detector(key).to(device)
            model.load_state_dict(weights)
            count, size = settings["population_batches"], settings["batch_size"]
            estimate_population_statistics(
                model.train(), batches(train, size, seed), count, labelled=True,
                forward=run_detector, progress=False,
            )  # fmt: skip
        yield {key: box_ap(model, val)}


def _seconds(settings: Settings, keys: Sequence[str], device: torch.device) -> float:
    """Time three steps of a training, and take the rest to last as long as the quickest."""
    trainings = sum(bool(set(keys).intersection(of_one)) for of_one in _TRAININGS)
    threads = torch.get_num_threads()
    together = min(trainings, threads) if device.type == "cpu" else 1
    data = ShapesDataset("shapes_train", num_images=settings["batch_size"], in_memory=True)
    model = _detector("row 3").to(device)
    try:
        torch.set_num_threads(1 if trainings > 1 else threads)
        train_detector(model, data, {**settings, "steps": 1}, 0)
        step = math.inf
        for _ in range(3):
            start = time.perf_counter()
            train_detector(model, data, {**settings, "steps": 1}, 0)
            step = min(step, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    # statistics without gradients; an image in which a bad head finds much lasts nearly a step
    evaluation = settings["population_batches"] / 2 + settings["val_images"] / 2
    return step * (trainings * settings["steps"] + len(keys) * evaluation) / together


STUDY = Study(
    name="rows",
    title="Domains in RetinaNet's head: train statistics / population statistics / affine",
    source="Table 5",
    panels=[
        Panel(
            "S shared by the levels, D one per level",
            "head",
            [
                Series(
                    "training and inference agree on the batch, or there is none",
                    [
                        *(Point(row, _label(row), _PAPER[row]) for row in _AGREE),
                        *(Point(label, label, ap) for label, ap in _OTHERS.items()),
                    ],
                ),
                Series(
                    "they disagree",
                    [*(Point(r, _label(r), _PAPER[r]) for r in _DISAGREE), Point(_EMA, _EMA)],
                ),
            ],
            "Table 5",
            y_label="box AP",
            ordered=False,
            ticks=[*map(_label, _PAPER), _EMA, *_OTHERS],
        ),
    ],
    claims=[
        *(Claim(f"row 3 is below row {n}", low="row 3", high=f"row {n}") for n in (1, 4, 6)),
        Claim("row 5 is below row 6", low="row 5", high="row 6"),
        Claim("row 2 is at the bottom", low="row 2", high="row 3"),
        Claim("row 3 by moving averages is below row 3", low=_EMA, high="row 3"),
        Claim("rows 1 and 4 are about equal", low="row 1", high="row 4", similar=True),
        Claim("rows 1 and 6 are about equal", low="row 1", high="row 6", similar=True),
    ],
    settings={
        **{"train_images": 1000, "val_images": 200, "batch_size": 8},
        **{"steps": 1000, "lr": 0.02, "population_batches": 25},
    },
    quick={
        **{"train_images": 16, "val_images": 8, "batch_size": 4},
        **{"steps": 3, "population_batches": 2},
    },
    run=run,
    seeds=1,
    more=["row 1", "row 2", "row 5", "row 6", *_OTHERS],
    seconds=_seconds,
)
