"""Normalisation batch size: population or mini-batch statistics at inference (section 4).

The total batch is fixed and normalised in groups of NBS samples. At a small NBS training sees
statistics that inference by population statistics never does; mini-batches at inference agree
with training, and so does training that ends with frozen statistics.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from rethinking_bn.layers import BatchNorm2d
from studies.data import CAMERAS, QUICK_CAMERAS, Digits, load_digits, shuffled_indices
from studies.study import Claim, Panel, Point, Series, Settings, Study, Values
from studies.training import error, make_net, mini_batch_error, precise, train

# Read off Figures 5 and 6, to 0.1: error in % by normalisation batch size.
_NBS = (128, 64, 32, 16, 8, 4, 2)
_PAPER = {
    "population statistics": (23.4, 23.2, 23.4, 23.5, 24.3, 26.4, 32.5),
    "mini-batch statistics": (24.7, 24.7, 24.5, 24.7, 25.1, 25.5, 26.0),
    "FrozenBN for the last fifth": (24.4, 24.2, 24.3, 23.9, 24.2, 24.3, 25.2),
}
_FROZEN = 0.8  # of the training, when the statistics are frozen


def run(settings: Settings, seed: int, device: torch.device) -> Iterator[Values]:
    """Yield once per NBS and per way to train."""
    digits = load_digits(device, seed, settings["conditions"])
    number = len(digits.test.labels)
    generator = torch.Generator().manual_seed(seed)
    mixed = digits.test.take(torch.randperm(number, generator=generator))
    for nbs in _NBS:
        net = _train(settings, digits, seed, nbs, frozen=False)
        # large batches: the population's statistics are to be right, whatever training saw
        precise(net, digits.train.images, settings["total_batch"])
        yield {
            f"NBS={nbs}, population statistics": error(net, digits.test),
            f"NBS={nbs}, mini-batch statistics": mini_batch_error(net, mixed, nbs),
        }
        net = _train(settings, digits, seed, nbs, frozen=True)
        yield {f"NBS={nbs}, FrozenBN for the last fifth": error(net, digits.test)}


def _train(settings: Settings, digits: Digits, seed: int, nbs: int, frozen: bool) -> nn.Module:
    torch.manual_seed(seed)
    net = make_net().to(digits.train.images.device)
    total, steps = settings["total_batch"], settings["steps"]
    batches = shuffled_indices(len(digits.train.labels), total, seed)
    for done in train(net, digits.train, batches, steps=steps, lr=settings["lr"], nbs=nbs):
        if frozen and done == round(_FROZEN * steps):
            precise(net, digits.train.images, total)
            for layer in net.modules():
                if isinstance(layer, BatchNorm2d):  # population statistics from now on
                    layer.eval().requires_grad_(False)
    return net


_POPULATION, _MINI_BATCH, _FREEZING = _PAPER

STUDY = Study(
    name="train-test",
    title="The batch in training and at inference",
    source="Figures 5 and 6",
    panels=[
        Panel(
            "Normalisation batch size at a fixed total batch",
            "NBS",
            [
                Series(arm, [Point(f"NBS={n}, {arm}", str(n), v) for n, v in points])
                for arm, points in ((a, list(zip(_NBS, p, strict=True))) for a, p in _PAPER.items())
            ],
            "Figures 5 and 6",
        ),
    ],
    claims=[
        Claim(
            "at NBS 2, mini-batch statistics at inference beat population statistics",
            low=f"NBS=2, {_MINI_BATCH}",
            high=f"NBS=2, {_POPULATION}",
        ),
        Claim(
            "at NBS 2, FrozenBN for the last fifth beats population statistics",
            low=f"NBS=2, {_FREEZING}",
            high=f"NBS=2, {_POPULATION}",
        ),
        Claim(
            "at NBS 64, population statistics beat mini-batch statistics",
            low=f"NBS=64, {_POPULATION}",
            high=f"NBS=64, {_MINI_BATCH}",
        ),
        Claim(
            "population statistics at NBS 2 are worse than at 32",
            low=f"NBS=32, {_POPULATION}",
            high=f"NBS=2, {_POPULATION}",
        ),
    ],
    settings={"steps": 200, "total_batch": 128, "lr": 0.1, "conditions": CAMERAS},
    quick={"steps": 4, "conditions": QUICK_CAMERAS},
    run=run,
)
