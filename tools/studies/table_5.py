"""Table 5: which levels of RetinaNet's head share statistics and affine (section 5).

torchvision's RetinaNet on the generated shapes, small and trained from scratch. Rows that differ
only in population statistics share their training: rows 2, 4 and 5 are population training of the
networks of rows 1, 3 and 6. Every row's population statistics are estimated on the same batches.

The paper's training sees 500 times as many images, and its row 2 loses nearly all, not a part. Row
3 is evaluated by its moving averages, too: what a BatchNorm that is called level after level has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from rethinking_bn.data import ShapesDataset
from rethinking_bn.layers.multi_domain import TABLE_5, Choice
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
_TRAINED = (("row 1", "row 2"), ("row 3", "row 4"), ("row 6", "row 5"))  # the first is trained


def _choices(row: str) -> dict[str, Choice]:
    return TABLE_5[int(row.removeprefix("row "))]


def _label(row: str) -> str:
    letters = "/".join(choice[0].upper() for choice in _choices(row).values())
    return f"{row}: {letters}"


def run(
    settings: Settings, seed: int, device: torch.device, tick: Callable[..., Any]
) -> Iterator[Part]:
    """Yield a part for each training: rows that share weights together, GN and none."""
    train = ShapesDataset("shapes_train", num_images=settings["train_images"], in_memory=True)
    val = ShapesDataset("shapes_val", num_images=settings["val_images"], in_memory=True)

    def trained(norm: str, **choices: Any) -> nn.Module:
        torch.manual_seed(seed)
        model = make_detector(norm, **choices).to(device)
        train_detector(model, train, settings, seed, tick)
        return model

    def scored(row: str, model: nn.Module) -> Values:
        ap = box_ap(model, val)
        tick(_evaluation(settings))
        return {row: ap}

    def table_rows(rows: tuple[str, ...]) -> Iterator[Values]:
        model = trained("BN", **_choices(rows[0]))
        weights = copy.deepcopy(model.state_dict())
        if rows[0] == "row 3":
            yield scored(_EMA, model)
        for row in rows:
            model = make_detector("BN", **_choices(row)).to(device)
            model.load_state_dict(weights)
            count, size = settings["population_batches"], settings["batch_size"]
            estimate_population_statistics(
                model.train(), batches(train, size, seed), count, labelled=True,
                forward=run_detector, progress=False,
            )  # fmt: skip
            yield scored(row, model)

    def other(label: str, norm: str) -> Iterator[Values]:
        yield scored(label, trained(norm))

    for rows in _TRAINED:
        yield Part((*rows, _EMA) if "row 3" in rows else rows, partial(table_rows, rows))
    for label, norm in (("GN", "GN"), ("no norm", "")):
        yield Part([label], partial(other, label, norm))


def _evaluation(settings: Settings) -> int:
    """Return the steps of training that take as long as one row's statistics and evaluation."""
    return (settings["population_batches"] + settings["val_images"] // 4) // 2


def _ticks(settings: Settings) -> tuple[int, int]:
    steps, row = settings["steps"], _evaluation(settings)
    return len(_TRAINED) * steps + (len(_PAPER) + 1) * row, len(_OTHERS) * (steps + row)


STUDY = Study(
    name="rows",
    title="Domains in RetinaNet's head: train statistics / population statistics / affine",
    source="Table 5",
    panels=(
        Panel(
            "S shared by the levels, D one per level",
            "head",
            "box AP",
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
            ordered=False,
            ticks=[*map(_label, _PAPER), _EMA, *_OTHERS],
        ),
    ),
    claims=(
        *(Claim(f"row 3 is below row {n}", low="row 3", high=f"row {n}") for n in (1, 4, 6)),
        Claim("row 5 is below row 6", low="row 5", high="row 6"),
        Claim("row 2 is at the bottom", low="row 2", high="row 3"),
        Claim("row 3 by moving averages is below row 3", low=_EMA, high="row 3"),
        Claim("rows 1 and 4 are about equal", low="row 1", high="row 4", similar=True),
        Claim("rows 1 and 6 are about equal", low="row 1", high="row 6", similar=True),
    ),
    settings={
        **{"train_images": 1000, "val_images": 200, "batch_size": 8},
        **{"steps": 1000, "lr": 0.02, "population_batches": 25},
    },
    quick={
        **{"train_images": 16, "val_images": 8, "batch_size": 4},
        **{"steps": 3, "lr": 0.02, "population_batches": 2},
    },
    parts=len(_PAPER) + 1 + len(_OTHERS),
    run=run,
    seeds=1,
    more=tuple(_OTHERS),
    ticks=_ticks,
)
