"""Table 5: which levels of RetinaNet's head share statistics and affine (section 5).

torchvision's RetinaNet on the generated shapes, trained from scratch. Rows that differ only in
population statistics share their training: rows 2, 4 and 5 are population training of the
networks of rows 1, 3 and 6. Every row's population statistics are estimated on the same batches.

Two things differ from the paper, whose training sees 300 times as many images: statistics per level
get going sooner, so that rows 4 and 6 are ahead of row 1, and row 2 loses a part, not nearly all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rethinking_bn.data import ShapesDataset
from rethinking_bn.layers.multi_domain import TABLE_5, Choice
from rethinking_bn.population import estimate_population_statistics
from rethinking_bn.studies.detection import batches, box_ap, make_detector, train_detector
from rethinking_bn.studies.study import Claim, Panel, Point, Series, Settings, Study, Values
from rethinking_bn.torchvision import run_detector

# The paper's AP.
_PAPER = {"row 1": 39.1, "row 2": 2.1, "row 3": 34.1, "row 4": 39.1, "row 5": 35.5, "row 6": 39.2}
_OTHERS = {"GN": 39.5, "no norm": 38.7}
_TRAINED = {"row 1": ("row 1", "row 2"), "row 3": ("row 3", "row 4"), "row 6": ("row 6", "row 5")}


def _choices(row: str) -> dict[str, Choice]:
    return TABLE_5[int(row.removeprefix("row "))]


def run(settings: Settings, seed: int, device: torch.device) -> Iterator[Values]:
    """Train five detectors; yields after each row, GN and none."""
    train = ShapesDataset("shapes_train", num_images=settings["train_images"], in_memory=True)
    val = ShapesDataset("shapes_val", num_images=settings["val_images"], in_memory=True)
    for trained, rows in _TRAINED.items():
        torch.manual_seed(seed)
        model = make_detector("BN", **_choices(trained)).to(device)
        train_detector(model, train, settings, seed, label=trained)
        weights = model.state_dict()
        for row in rows:
            other = make_detector("BN", **_choices(row)).to(device)
            other.load_state_dict(weights)
            count, size = settings["population_batches"], settings["batch_size"]
            estimate_population_statistics(
                other.train(), batches(train, size, seed), count, labelled=True,
                forward=run_detector, progress=False,
            )  # fmt: skip
            yield {row: box_ap(other, val, row)}
    for label, norm in (("GN", "GN"), ("no norm", "")):
        torch.manual_seed(seed)
        model = make_detector(norm).to(device)
        train_detector(model, train, settings, seed, label=label)
        yield {label: box_ap(model, val, label)}


def _label(row: str) -> str:
    letters = "/".join(choice[0].upper() for choice in _choices(row).values())
    return f"{row}: {letters}"


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
                    "",
                    [
                        *(Point(row, _label(row), ap) for row, ap in _PAPER.items()),
                        *(Point(label, label, ap) for label, ap in _OTHERS.items()),
                    ],
                )
            ],
            "Table 5",
            ordered=False,
        ),
    ),
    claims=(
        *(Claim(f"row 3 is below row {n}", low="row 3", high=f"row {n}") for n in (1, 4, 6)),
        Claim("row 5 is below row 6", low="row 5", high="row 6"),
        Claim("row 2 is at the bottom", low="row 2", high="row 3"),
        Claim("rows 1 and 4 are about equal", low="row 1", high="row 4", similar=True),
        Claim("rows 1 and 6 are about equal", low="row 1", high="row 6", similar=True),
    ),
    settings={
        "train_images": 1000,
        "val_images": 200,
        "batch_size": 8,
        "steps": 1600,
        "lr": 0.02,
        "population_batches": 40,
    },
    quick={
        "train_images": 16,
        "val_images": 8,
        "batch_size": 4,
        "steps": 3,
        "lr": 0.02,
        "population_batches": 2,
    },
    parts=len(_PAPER) + len(_OTHERS),
    run=run,
    seeds=1,
)
