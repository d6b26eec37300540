"""Two domains in every batch: which statistics they share, in training and at inference.

Clean digits and the same scans at low contrast are trained on together, in batches with a fixed
share of each; each test set is normalised as its domain. Rows of Table 5 (arXiv 2105.07576), with
domains in the data in place of feature levels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rethinking_bn.layers import SplitBatchNorm2d, row_domains
from rethinking_bn.layers.multi_domain import Choice
from rethinking_bn.population import estimate_population_statistics
from studies.data import NUM_TRAIN, Split, corrupted, load_digits, shuffled_indices
from studies.study import Claim, Panel, Point, Series, Settings, Study, Values
from studies.training import error, make_net, train_to_the_end

_CORRUPTION = "contrast"
_S: Choice = "shared"
_D: Choice = "domain_specific"
# train_stats, population_stats, affine
_ARMS = {
    "row 1: all shared": (_S, _S, _S),
    "row 2: only population specific": (_S, _D, _S),
    "row 3: only training specific": (_D, _S, _S),
    "row 4: statistics specific": (_D, _D, _S),
    "row 6: all specific": (_D, _D, _D),
}
_ROW_1, _ROW_2, _ROW_3, _ROW_4, _ROW_6 = _ARMS
# the arms whose SGD training a row shares, as those that differ in population statistics only do
_TRAININGS = {_ROW_1: (_ROW_1, _ROW_2), _ROW_4: (_ROW_4, _ROW_3), _ROW_6: (_ROW_6,)}
_SHARES = (6, 25, 50)  # % of corrupted images in a batch
_WRONG = f"{_CORRUPTION}, as clean"


def run(settings: Settings, seed: int, device: torch.device) -> Iterator[Values]:
    """Yield once per SGD training."""
    digits = load_digits(device)
    level = settings["severity"]
    low = [corrupted(s, _CORRUPTION, level, 2 * seed + i) for i, s in enumerate(digits)]
    both = Split(*(torch.cat(pair) for pair in zip(digits.train, low[0], strict=True)))
    tests = (digits.test, low[1])
    for share in _SHARES:
        other = settings["batch_size"] * share // 100
        sizes = (settings["batch_size"] - other, other)
        rows = [0] * sizes[0] + [1] * sizes[1]
        for trained, arms in _TRAININGS.items():
            if not (measured := [a for a in arms if _key(share, a, "clean") in STUDY.keys()]):
                continue
            torch.manual_seed(seed)
            net = _net(trained).to(device)
            with row_domains(net, rows):
                schedule = {"steps": settings["steps"], "lr": settings["lr"]}
                train_to_the_end(net, both, _batches(sizes, seed), **schedule)
            values: Values = {}
            for arm in measured:
                own = _net(arm).to(device)
                own.load_state_dict(net.state_dict())  # a layer converts statistics to its layout
                number = NUM_TRAIN // sizes[0]
                seen = [both.images[i] for i in itertools.islice(_batches(sizes, seed), number)]
                with row_domains(own, rows):
                    estimate_population_statistics(own, seen, number, labelled=True, progress=False)
                for name, domain in _tests(arm).items():
                    with row_domains(own, domain):
                        values[_key(share, arm, name)] = error(own, tests[name != "clean"])
            yield values


def _key(share: int, arm: str, test: str) -> str:
    return f"{share}% corrupted, {arm}, {test}"


def _at(arm: str, share: int = 50) -> str:
    return _key(share, arm, _CORRUPTION)


def _net(arm: str) -> nn.Sequential:
    train, population, affine = _ARMS[arm]
    choices: Any = {"train_stats": train, "population_stats": population, "affine": affine}
    return make_net(lambda channels: SplitBatchNorm2d(channels, 2, **choices))


def _batches(sizes: Sequence[int], seed: int) -> Iterator[Tensor]:
    """Yield batches of so many clean images, then so many corrupted ones."""
    clean = shuffled_indices(NUM_TRAIN, sizes[0], seed)
    other = shuffled_indices(NUM_TRAIN, sizes[1], seed + 1)
    for own, corrupt in zip(clean, other, strict=False):
        yield torch.cat([own, corrupt + NUM_TRAIN])


def _tests(arm: str) -> dict[str, int]:
    """Return test set -> the domain that it is normalised as."""
    return {"clean": 0, _CORRUPTION: 1, **({_WRONG: 0} if arm == _ROW_6 else {})}


STUDY = Study(
    name="domains",
    title="Clean and corrupted images in one batch",
    source="Section 5.2",
    panels=(
        Panel(
            "Half of the training images corrupted",
            "evaluated on",
            [Series(arm, [Point(_key(50, arm, t), t) for t in _tests(arm)]) for arm in _ARMS],
            ordered=False,
        ),
        Panel(
            "By the share of corrupted images",
            "corrupted images in a batch (%)",
            [
                Series(f"{arm}, {test}", [Point(_key(s, arm, test), str(s)) for s in _SHARES])
                for arm in (_ROW_1, _ROW_6)
                for test in _tests(_ROW_1)
            ],
        ),
    ),
    claims=[
        Claim("after shared training, specific statistics hurt", _at(_ROW_1), _at(_ROW_2)),
        Claim("after specific training, shared statistics hurt", _at(_ROW_4), _at(_ROW_3)),
        Claim("another domain's statistics hurt", _at(_ROW_6), _key(50, _ROW_6, _WRONG)),
        Claim("specific statistics serve few images", _at(_ROW_6, 6), _at(_ROW_1, 6)),
    ],
    settings={"steps": 100, "batch_size": 64, "lr": 0.05, "severity": 5},
    quick={"steps": 10},
    run=run,
)
