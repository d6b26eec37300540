"""Two domains in every batch: which statistics they share, in training and at inference.

Clean digits and the same scans at low contrast are trained on together, in batches with a fixed
share of each; each test set is normalised as its domain. Rows of Table 5 (arXiv 2105.07576), with
domains in the data in place of feature levels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rethinking_bn.layers import SplitBatchNorm2d, row_domains
from rethinking_bn.layers.domain_state import Choice
from rethinking_bn.population import estimate_population_statistics
from rethinking_bn.studies.data import NUM_TRAIN, Split, corrupted, load_digits, shuffled_indices
from rethinking_bn.studies.network import make_net
from rethinking_bn.studies.study import Claim, Panel, Point, Series, Settings, Study, Values
from rethinking_bn.studies.training import error, train_to_the_end

_CORRUPTION = "contrast"
_DOMAINS = ("clean", _CORRUPTION)


class _Choices(NamedTuple):
    """The arguments of SplitBatchNorm2d that make an arm."""

    train_stats: Choice
    population_stats: Choice
    affine: Choice


_S: Choice = "shared"
_D: Choice = "domain_specific"
_ARMS = {
    "row 1: all shared": _Choices(_S, _S, _S),
    "row 2: only population specific": _Choices(_S, _D, _S),
    "row 3: only training specific": _Choices(_D, _S, _S),
    "row 4: statistics specific": _Choices(_D, _D, _S),
    "row 6: all specific": _Choices(_D, _D, _D),
}
_ROW_1, _ROW_2, _ROW_3, _ROW_4, _ROW_6 = _ARMS
# the arms whose SGD training a row shares, as those that differ in population statistics only do
_TRAININGS = {_ROW_1: (_ROW_1, _ROW_2), _ROW_4: (_ROW_4, _ROW_3), _ROW_6: (_ROW_6,)}
_SHARES = (6, 25, 50)  # % of corrupted images in a batch
_WRONG = f"{_CORRUPTION}, as clean"


def run(settings: Settings, seed: int, device: torch.device) -> Iterator[Values]:
    """Yield once per SGD training."""
    digits = load_digits(device)
    low = [
        corrupted(s, _CORRUPTION, settings["severity"], 2 * seed + i) for i, s in enumerate(digits)
    ]
    both = Split(*(torch.cat(pair) for pair in zip(digits.train, low[0], strict=True)))
    tests = dict(zip(_DOMAINS, (digits.test, low[1]), strict=True))
    for share in _SHARES:
        other = settings["batch_size"] * share // 100
        sizes = (settings["batch_size"] - other, other)
        for trained, arms in _TRAININGS.items():
            measured = [arm for arm in arms if _key(share, arm, "clean") in STUDY.keys()]
            if not measured:
                continue
            torch.manual_seed(seed)
            net = _net(_ARMS[trained]).to(device)
            with row_domains(net, [0] * sizes[0] + [1] * sizes[1]):
                train_to_the_end(
                    net,
                    both,
                    _batches(sizes, seed),
                    steps=settings["steps"],
                    lr=settings["lr"],
                    label=f"{share}% corrupted, {trained}",
                )
            values: Values = {}
            for arm in measured:
                values |= _evaluate(net, arm, share, sizes, both, tests, seed)
            yield values


def _key(share: int, arm: str, test: str) -> str:
    return f"{share}% corrupted, {arm}, {test}"


def _net(choices: _Choices) -> nn.Sequential:
    return make_net(lambda channels: SplitBatchNorm2d(channels, 2, **choices._asdict()))


def _batches(sizes: Sequence[int], seed: int) -> Iterator[Tensor]:
    """Yield batches of so many clean images, then so many corrupted ones."""
    clean = shuffled_indices(NUM_TRAIN, sizes[0], seed)
    other = shuffled_indices(NUM_TRAIN, sizes[1], seed + 1)
    for own, corrupt in zip(clean, other, strict=False):
        yield torch.cat([own, corrupt + NUM_TRAIN])


def _evaluate(
    trained: nn.Module,
    arm: str,
    share: int,
    sizes: Sequence[int],
    both: Split,
    tests: Mapping[str, Split],
    seed: int,
) -> Values:
    """Train an arm's population statistics as its batches are; return its errors."""
    net = _net(_ARMS[arm]).to(both.images.device)
    net.load_state_dict(trained.state_dict())  # a layer converts the statistics to its layout
    number = NUM_TRAIN // sizes[0]
    batches = [both.images[i] for i in itertools.islice(_batches(sizes, seed), number)]
    with row_domains(net, [0] * sizes[0] + [1] * sizes[1]):
        estimate_population_statistics(net, batches, number, labelled=True, progress=False)
    values: Values = {}
    for domain, (name, test) in enumerate(tests.items()):
        with row_domains(net, domain):
            values[_key(share, arm, name)] = error(net, test)
    if arm == _ROW_6:
        with row_domains(net, 0):
            values[_key(share, arm, _WRONG)] = error(net, tests[_CORRUPTION])
    return values


def _points(arm: str, share: int = 50) -> list[Point]:
    tests = (*_DOMAINS, _WRONG) if arm == _ROW_6 else _DOMAINS
    return [Point(_key(share, arm, test), test) for test in tests]


STUDY = Study(
    name="domains",
    title="Clean and corrupted images in one batch",
    source="Section 5.2",
    panels=(
        Panel(
            "Half of the training images corrupted",
            "evaluated on",
            "error (%)",
            [Series(arm, _points(arm)) for arm in _ARMS],
            ordered=False,
        ),
        Panel(
            "By the share of corrupted images",
            "corrupted images in a batch (%)",
            "error (%)",
            [
                Series(f"{arm}, {test}", [Point(_key(s, arm, test), str(s)) for s in _SHARES])
                for arm in (_ROW_1, _ROW_6)
                for test in _DOMAINS
            ],
        ),
    ),
    claims=(
        Claim(
            "trained by shared statistics, specific ones at inference hurt",
            low=_key(50, _ROW_1, _CORRUPTION),
            high=_key(50, _ROW_2, _CORRUPTION),
        ),
        Claim(
            "trained by specific statistics, shared ones at inference hurt",
            low=_key(50, _ROW_4, _CORRUPTION),
            high=_key(50, _ROW_3, _CORRUPTION),
        ),
        Claim(
            "another domain's statistics hurt",
            low=_key(50, _ROW_6, _CORRUPTION),
            high=_key(50, _ROW_6, _WRONG),
        ),
        *(
            Claim(
                f"few corrupted images: specific statistics serve them ({_ROW_6[:5]})",
                low=_key(share, _ROW_6, _CORRUPTION),
                high=_key(share, _ROW_1, _CORRUPTION),
            )
            for share in _SHARES[:1]
        ),
    ),
    settings={"steps": 100, "batch_size": 64, "lr": 0.05, "severity": 5},
    quick={"steps": 10, "batch_size": 64, "lr": 0.05, "severity": 5},
    parts=7,
    run=run,
)
