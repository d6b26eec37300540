"""Population statistics: EMA or PreciseBN, from how many samples, in which batches (section 3).

Table 1 asks how many samples PreciseBN needs and what EMA costs early in a training with large
batches, when weights move faster than a moving average follows. Table 2 splits the same samples
into batches of B: the smaller they are, the less the activations behind a normalised layer
resemble those at inference.

Batches that are not full are left out: of 100 samples in batches of 32, 96 are used. What Table 2
shows is faint here, with 15 layers to compound what a small batch gets wrong; the paper's have 53.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from studies.data import CAMERAS, QUICK_CAMERAS, Digits, load_digits, shuffled_indices
from studies.study import Claim, Panel, Point, Series, Settings, Study, Values
from studies.training import error, make_net, precise, train

# The paper's numbers: error in %, ResNet-50 on ImageNet, for EMA and N or B samples.
_PAPER_1 = {
    "small batch, late": (23.7, 28.1, 24.0, 23.57),
    "large batch, early": (52.8, 45.5, 40.1, 39.44),
    "large batch, late": (24.0, 29.0, 24.1, 23.77),
}
_PAPER_2 = {"NBS=32": (23.7, 28.8, 24.0, 23.5, 23.5), "NBS=2": (35.5, 34.4, 32.3, 32.0, 32.0)}
_SAMPLES = (10, 100, 1000)  # N of Table 1
_BATCHES = (2, 10, 100, 1000)  # B of Table 2


def _panel(
    title: str, source: str, paper: Mapping[str, Sequence[float]], names: list[str]
) -> Panel:
    lines = [
        Series(arm, [Point(f"{arm}, {x}", x, v) for x, v in zip(names, values, strict=True)])
        for arm, values in paper.items()
    ]
    return Panel(title, "population statistics", lines, source)


def run(settings: Settings, seed: int, device: torch.device) -> Iterator[Values]:
    """Train at a small, a large and a divided batch; yields after each."""
    digits = load_digits(device, seed, settings["conditions"])
    small, large = settings["small_batch"], settings["large_batch"]
    yield from _train(settings, digits, seed, small, "small batch", None, "NBS=32")
    yield from _train(settings, digits, seed, large, "large batch", settings["early"], None)
    yield from _train(settings, digits, seed, small, "small batch", None, "NBS=2", nbs=2)


def _train(
    settings: Settings,
    digits: Digits,
    seed: int,
    batch_size: int,
    arm: str,
    early: float | None,
    table_2: str | None,
    nbs: int | None = None,
) -> Iterator[Values]:
    """Train one network and evaluate it under all population statistics."""
    torch.manual_seed(seed)
    net = make_net().to(digits.train.images.device)
    number = len(digits.train.labels)
    steps = settings["epochs"] * number // batch_size
    lr = settings["lr_per_sample"] * batch_size
    batches = shuffled_indices(number, batch_size, seed)
    values: Values = {}
    watched = {steps: "late"} if early is None else {round(early * steps): "early", steps: "late"}
    for done in train(net, digits.train, batches, steps=steps, lr=lr, nbs=nbs):
        if done in watched and nbs is None:
            key = f"{arm}, {watched[done]}"
            values[f"{key}, EMA"] = error(net, digits.test)
            for n in _SAMPLES:
                values[f"{key}, N={n}"] = _after(net, digits, seed, n, batch_size)
    if table_2 is not None:
        values[f"{table_2}, EMA"] = error(net, digits.test)
        for b in _BATCHES:
            values[f"{table_2}, B={b}"] = _after(net, digits, seed, max(_SAMPLES), b)
    yield values


def _after(net: nn.Module, digits: Digits, seed: int, samples: int, batch_size: int) -> float:
    """Return the error in % after population training on so many samples; EMA's come back."""
    ema = {name: value.clone() for name, value in net.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(digits.train.labels), generator=generator)[:samples]
    precise(net, digits.train.images[chosen], batch_size)
    result = error(net, digits.test)
    net.load_state_dict(ema)
    return result


_LATE, _EARLY = "small batch, late", "large batch, early"

STUDY = Study(
    name="population",
    title="EMA or PreciseBN, from N samples, in batches of B",
    source="Tables 1 and 2",
    panels=[
        _panel("EMA or PreciseBN", "Table 1", _PAPER_1, ["EMA", *(f"N={n}" for n in _SAMPLES)]),
        _panel("Batches of B", "Table 2", _PAPER_2, ["EMA", *(f"B={b}" for b in _BATCHES)]),
    ],
    claims=[
        Claim(
            "early in training with large batches PreciseBN beats EMA",
            low=f"{_EARLY}, N=1000",
            high=f"{_EARLY}, EMA",
        ),
        Claim(
            "late in training a thousand samples do as well as EMA",
            low=f"{_LATE}, N=1000",
            high=f"{_LATE}, EMA",
            similar=True,
        ),
        Claim("ten samples are too few", low=f"{_LATE}, N=1000", high=f"{_LATE}, N=10"),
        Claim("batches of 2 spoil an estimate", low="NBS=32, B=1000", high="NBS=32, B=2"),
        Claim("trained at NBS 2, too", low="NBS=2, B=1000", high="NBS=2, B=2"),
        Claim("trained at NBS 2, EMA is worse", low="NBS=2, B=1000", high="NBS=2, EMA"),
    ],
    settings={
        "epochs": 20,
        "small_batch": 32,
        "large_batch": 500,
        "early": 0.3,  # of the training
        "lr_per_sample": 0.02 / 32,
        "conditions": CAMERAS,
    },
    quick={"epochs": 1, "early": 0.5, "conditions": QUICK_CAMERAS},
    run=run,
)
