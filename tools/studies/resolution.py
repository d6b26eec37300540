"""FixRes: a network used at another size of image than it was trained at.

Touvron et al. (arXiv 1906.06423) fine-tune the classifier and the last norm layer at the test size,
with the transforms of inference; everything else stays as it is. Beside that: population
statistics alone estimated at the test size, which takes no training and no labels.

The 8x8 scans are enlarged or reduced, so no size shows more than another: what is measured is what
the size alone does to features and their statistics, not what higher resolution is worth.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from rethinking_bn.population import train_only
from studies.data import Split, load_digits, shuffled_indices
from studies.study import Claim, Panel, Point, Series, Settings, Study, Values
from studies.training import constant_rate, error, precise, train_to_the_end, trained

_TRAINED_AT = 8
_SIZES = (6, 8, 10, 12)
_ARMS = ("as trained", "statistics of the size", "FixRes")
_TRAINED = ("8.branch.4", "11")  # the last block's last norm and the classifier of make_net


def run(settings: Settings, seed: int, device: torch.device) -> Iterator[Values]:
    """Yield once per size."""
    digits = load_digits(device, seed, settings["conditions"])
    net = trained(settings, digits.train, seed)
    precise(net, digits.train.images, settings["population_batch"])
    for pixels in _SIZES:
        data, test = (_resized(split, pixels) for split in digits)
        estimated, tuned = copy.deepcopy(net), copy.deepcopy(net)
        precise(estimated, data.images, settings["population_batch"])
        train_only(tuned, _TRAINED)
        batches = shuffled_indices(len(data.labels), settings["batch_size"], seed)
        options = {"steps": settings["tuning_steps"], "lr": settings["tuning_lr"]}
        train_to_the_end(tuned, data, batches, schedule=constant_rate, **options)
        precise(tuned, data.images, settings["population_batch"])  # the trained norm's
        nets = zip(_ARMS, (net, estimated, tuned), strict=True)
        yield {f"{arm}, {pixels}": error(model, test) for arm, model in nets}


def _resized(split: Split, pixels: int) -> Split:
    if pixels == _TRAINED_AT:
        return split
    images = F.interpolate(split.images, (pixels, pixels), mode="bilinear", antialias=True)
    return Split(images, split.labels)


STUDY = Study(
    name="resolution",
    title="Trained at 8 pixels, used at another size",
    source="FixRes (arXiv 1906.06423)",
    panels=[
        Panel(
            "Digits enlarged or reduced",
            "pixels",
            [Series(arm, [Point(f"{arm}, {n}", str(n)) for n in _SIZES]) for arm in _ARMS],
        ),
    ],
    claims=[
        Claim("another size costs", "as trained, 8", "as trained, 12"),
        Claim("FixRes gets some of it back", "FixRes, 12", "as trained, 12"),
        Claim("so do statistics of the size alone", f"{_ARMS[1]}, 12", "as trained, 12"),
        Claim("FixRes does more", "FixRes, 12", f"{_ARMS[1]}, 12"),
        Claim("at the training size nothing changes", "FixRes, 8", "as trained, 8", similar=True),
    ],
    settings={
        "steps": 200,
        "batch_size": 32,
        "lr": 0.05,
        "tuning_steps": 40,
        "tuning_lr": 0.01,
        "population_batch": 100,
        # far from 0, an image's brightness would make its border, against the padding, what a
        # size changes most
        "conditions": {"copies": 1, "contrast": 0.5, "brightness": 0.1, "noise": 0.1},
    },
    quick={"steps": 8, "tuning_steps": 2},
    run=run,
)
