"""Distillation: a narrow network taught by labels alone, and by a wide one's soft targets too.

The teacher is in eval mode, so that what it says of an image does not depend on the batch: its
population statistics are estimated once its training is over.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from rethinking_bn.distillation import kl_soft_loss
from studies.data import CAMERAS, QUICK_CAMERAS, load_digits
from studies.study import Claim, Panel, Point, Series, Settings, Study, Values
from studies.training import SoftLoss, error, make_net, precise, trained

_TEMPERATURES = (1, 5, 10)


def run(settings: Settings, seed: int, device: torch.device) -> Iterator[Values]:
    """Yield for the teacher, for a student of labels alone, and once per temperature."""
    digits = load_digits(device, seed, settings["conditions"])

    def taught(who: str, soft_loss: SoftLoss | None) -> nn.Module:
        make = partial(make_net, widths=settings[f"{who}_widths"])
        options = {"steps": settings[f"{who}_steps"], "lr": settings[f"{who}_lr"]}
        net = trained(settings, digits.train, seed, make=make, soft_loss=soft_loss, **options)
        precise(net, digits.train.images, settings["population_batch"])
        return net

    teacher = taught("teacher", None)
    yield {"teacher": error(teacher, digits.test)}
    teacher.eval()
    yield {"labels alone": error(taught("student", None), digits.test)}
    for temperature in _TEMPERATURES:
        soft = partial(_soft_loss, teacher, temperature, settings["weight"])
        yield {f"T={temperature}": error(taught("student", soft), digits.test)}


def _soft_loss(
    teacher: nn.Module, temperature: float, weight: float, images: Tensor, logits: Tensor
) -> Tensor:
    with torch.no_grad():
        targets = teacher(images)
    return weight * kl_soft_loss(logits, targets, temperature)


_STUDENTS = [
    Point("labels alone", "labels alone"),
    *(Point(f"T={t}", f"and teacher, T={t}") for t in _TEMPERATURES),
]

STUDY = Study(
    name="distillation",
    title="Soft targets of a wide teacher for a narrow student",
    source="arXiv 1503.02531",
    panels=[
        Panel(
            "A student a quarter as wide",
            "taught by",
            [Series("student", _STUDENTS), Series("teacher", [Point("teacher", "labels alone")])],
            ordered=False,
        ),
    ],
    claims=[
        Claim("the wide network is better", low="teacher", high="labels alone"),
        Claim("its soft targets at T 5 help the narrow one", low="T=5", high="labels alone"),
        Claim("T 5 is better than T 1", low="T=5", high="T=1"),
    ],
    settings={
        "student_steps": 200,
        "teacher_steps": 400,
        "batch_size": 32,
        "teacher_lr": 0.05,
        "student_lr": 0.02,  # narrow networks do not train at the teacher's
        "teacher_widths": [16, 32, 64],
        "student_widths": [4, 8, 16],
        "weight": 1.0,
        "population_batch": 100,
        "conditions": CAMERAS,
    },
    quick={"student_steps": 8, "teacher_steps": 8, "conditions": QUICK_CAMERAS},
    run=run,
)
