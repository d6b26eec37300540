"""Distillation: a narrow network taught by labels alone, and by a wide one's soft targets too.

The teacher is in eval mode, so that what it says of an image does not depend on the batch: its
population statistics are estimated once its training is over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rethinking_bn.distillation import kl_soft_loss
from studies.data import Digits, load_digits, shuffled_indices
from studies.network import make_net
from studies.study import Claim, Panel, Point, Series, Settings, Study, Values
from studies.training import SoftLoss, error, precise, train_to_the_end

_TEMPERATURES = (1, 5, 10)


def run(settings: Settings, seed: int, device: torch.device) -> Iterator[Values]:
    """Yield for the teacher, for a student of labels alone, and once per temperature."""
    digits = load_digits(device, seed, settings["conditions"])
    teacher = _train(settings, digits, seed, settings["teacher_widths"], "teacher_", None)
    yield {"teacher": error(teacher, digits.test)}
    teacher.eval()
    for temperature in (None, *_TEMPERATURES):
        soft = None
        if temperature is not None:
            soft = partial(_soft_loss, teacher, temperature, settings["weight"])
        student = _train(settings, digits, seed, settings["student_widths"], "", soft)
        name = "labels alone" if temperature is None else f"T={temperature}"
        yield {name: error(student, digits.test)}


def _train(
    settings: Settings,
    digits: Digits,
    seed: int,
    widths: Sequence[int],
    who: str,
    soft_loss: SoftLoss | None,
) -> nn.Module:
    torch.manual_seed(seed)
    net = make_net(widths=widths).to(digits.train.images.device)
    train_to_the_end(
        net,
        digits.train,
        shuffled_indices(len(digits.train.labels), settings["batch_size"], seed),
        steps=settings[f"{who}steps"],
        lr=settings[f"{who}lr"],
        label="teacher" if who else "student",
        soft_loss=soft_loss,
    )
    precise(net, digits.train.images, settings["population_batch"])
    return net


def _soft_loss(
    teacher: nn.Module, temperature: float, weight: float, images: Tensor, logits: Tensor
) -> Tensor:
    with torch.no_grad():
        targets = teacher(images)
    return weight * kl_soft_loss(logits, targets, temperature)


_SETTINGS = {
    "steps": 200,
    "teacher_steps": 400,
    "batch_size": 32,
    "teacher_lr": 0.05,
    "lr": 0.02,  # narrow networks do not train at the teacher's
    "teacher_widths": [16, 32, 64],
    "student_widths": [4, 8, 16],
    "weight": 1.0,
    "population_batch": 100,
    "conditions": {"copies": 2, "contrast": 0.1, "brightness": 2.0},
}

STUDY = Study(
    name="distillation",
    title="Soft targets of a wide teacher for a narrow student",
    source="arXiv 1503.02531",
    panels=(
        Panel(
            "A student a quarter as wide",
            "taught by",
            "error (%)",
            [
                Series(
                    "student",
                    [
                        Point("labels alone", "labels alone"),
                        *(Point(f"T={t}", f"and teacher, T={t}") for t in _TEMPERATURES),
                    ],
                ),
                Series("teacher", [Point("teacher", "labels alone")]),
            ],
            ordered=False,
        ),
    ),
    claims=(
        Claim("the wide network is better", low="teacher", high="labels alone"),
        Claim("its soft targets at T 5 help the narrow one", low="T=5", high="labels alone"),
        Claim("T 5 is better than T 1", low="T=5", high="T=1"),
    ),
    settings=_SETTINGS,
    quick={
        **_SETTINGS,
        "steps": 8,
        "teacher_steps": 8,
        "conditions": {"copies": 1, "contrast": 0.1, "brightness": 2.0},
    },
    parts=2 + len(_TEMPERATURES),
    run=run,
)
