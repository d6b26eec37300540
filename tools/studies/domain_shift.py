"""Population statistics of another domain: source or target images, labelled or not (section 5).

One network, trained on clean digits; the test images are corrupted, the weights stay. Population
training on images of the target needs no labels, and a few images go a long way.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from studies.data import NUM_TRAIN, corrupted, load_digits
from studies.study import Claim, Panel, Point, Series, Settings, Study, Values
from studies.training import error, precise, trained

# The paper's Table 4: error in % with the source's and with the target's own statistics.
_PAPER = {
    "contrast": (40.8, 33.1),
    "gaussian_noise": (64.4, 52.5),
    "jpeg": (40.4, 36.7),
    "clean": (23.4, 23.8),
}
_SHIFTED = ("contrast", "gaussian_noise", "jpeg")
_FEW = (4, 16, 64, 256)  # unlabelled target images
_ARMS = ("source statistics", "own statistics")


def run(settings: Settings, seed: int, device: torch.device) -> Iterator[Values]:
    """Train on clean digits; then yield once per domain."""
    digits = load_digits(device)
    batch_size = settings["batch_size"]
    steps = settings["epochs"] * NUM_TRAIN // batch_size
    net = trained(settings, digits.train, seed, steps=steps)
    precise(net, digits.train.images, batch_size)
    source = {name: value.clone() for name, value in net.state_dict().items()}
    order = torch.randperm(NUM_TRAIN, generator=torch.Generator().manual_seed(seed))
    for domain in _PAPER:
        seen, test = digits
        if domain != "clean":
            severity = settings["severity"]
            seen = corrupted(digits.train, domain, severity, 2 * seed)
            test = corrupted(digits.test, domain, severity, 2 * seed + 1)
        net.load_state_dict(source)
        values = {f"{domain}, source statistics": error(net, test)}
        # as in the paper, the clean domain's own statistics are those of the test images
        own = seen.images[order] if domain != "clean" else test.images
        for count in (*(_FEW if domain != "clean" else ()), len(own)):
            precise(net, own[:count], batch_size)
            arm = "own statistics" if count == len(own) else f"{count} images"
            values[f"{domain}, {arm}"] = error(net, test)
        yield values


def _few(domain: str) -> list[Point]:
    return [
        Point(f"{domain}, source statistics", "0 (source)"),
        *(Point(f"{domain}, {n} images", str(n)) for n in _FEW),
        Point(f"{domain}, own statistics", str(NUM_TRAIN)),
    ]


STUDY = Study(
    name="domain-shift",
    title="Statistics of the source or of the target domain",
    source="Table 4",
    panels=[
        Panel(
            "All target images",
            "evaluated on",
            [
                Series(arm, [Point(f"{d}, {arm}", d, paper[i]) for d, paper in _PAPER.items()])
                for i, arm in enumerate(_ARMS)
            ],
            "Table 4",
            ordered=False,
        ),
        Panel(
            "Few target images, no labels",
            "images",
            [Series(domain, _few(domain)) for domain in _SHIFTED],
        ),
    ],
    claims=[
        *(
            Claim(f"own statistics beat the source's under {d}", f"{d}, {own}", f"{d}, {source}")
            for d in _SHIFTED
            for source, own in [_ARMS]
        ),
        Claim(
            "on clean images the test images' statistics gain nothing",
            low="clean, source statistics",
            high="clean, own statistics",
            similar=True,
        ),
    ],
    settings={"epochs": 30, "batch_size": 32, "lr": 0.05, "severity": 5},
    quick={"epochs": 4},
    run=run,
)
