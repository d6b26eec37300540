"""Each planted defect is found by its name and at its place; the healthy twin has none."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rethinking_bn.diagnosis import Diagnosis, diagnose
from rethinking_bn.diagnosis.result import KINDS
from rethinking_bn.layers import CycleBatchNorm2d, MABN2d, MultiDomainBatchNorm2d
from rethinking_bn.population import estimate_population_statistics
from tests.diagnosis.cases import batches, healthy


def bad(diagnosis: Diagnosis) -> list[tuple[str, str, str]]:
    return [(f.kind, f.layer, f.severity) for f in diagnosis.findings if f.severity != "ok"]


def refusing(refuses: Callable[[Any, Tensor], bool]) -> Callable[[nn.Module, Tensor], Tensor]:
    """Return a forward that raises as detectron2's proposal generator does in training."""

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        out = model(batch)
        if refuses(model, out):
            raise FloatingPointError("Training has diverged.")
        return out

    return forward


def test_a_model_that_refuses_what_is_not_finite_is_diagnosed() -> None:
    net = healthy()
    set_nan(net)
    forward = refusing(lambda model, out: not out.isfinite().all())
    diagnosis = diagnose(net, batches(), forward=forward)
    (finding,) = diagnosis.of("non-finite", "layer1.bn2")
    assert finding.severity == "severe"
    (together,) = diagnosis.of("output-effect", "")
    assert together.severity == "severe" and together.evidence["stored_to_exact"] == math.inf


@pytest.mark.parametrize("waits", [False, True])
def test_what_is_refused_while_other_ranks_wait_in_the_forward_is_an_error(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = healthy()
    net.layer1.bn2.communicates = True  # in training mode, as synchronised layers do
    monkeypatch.setattr("rethinking_bn.diagnosis.examine.get_world_size", lambda group: 2)
    net.layer1.bn2.running_mean += 5
    count = itertools.count()
    forward = refusing(
        lambda model, out: next(count) >= len(batches()) and model.layer1.bn2.training == waits
    )
    if waits:
        with pytest.raises(FloatingPointError, match="diverged"):
            diagnose(net, batches(), forward=forward, labelled=True)
    else:  # by population statistics nobody waits
        assert diagnose(net, batches(), forward=forward, labelled=True).of("output-effect", "")


def test_a_layer_is_judged_though_the_model_refuses_constant_statistics() -> None:
    net = healthy().train()
    net.layer1.bn2.running_mean += 5
    forward = refusing(lambda model, out: not model.layer1.bn2.training)
    diagnosis = diagnose(net, batches(), forward=forward, output_batches=0)
    assert diagnosis.of("stale-statistics", "layer1.bn2")[0] in diagnosis.severe


@pytest.mark.parametrize("train", [False, True])
def test_a_healthy_model_has_no_finding_and_says_so_with_numbers(train: bool) -> None:
    diagnosis = diagnose(healthy().train(train), batches())
    assert not bad(diagnosis)
    assert "5 BN-like layers" in str(diagnosis) and "ok       5 layers" in str(diagnosis)
    fit = diagnosis.of("stale-statistics", "layer1.bn2")[0]
    assert fit.severity == "ok" and 0 < fit.evidence["z"] < 5 and fit.remedy == ""


@torch.no_grad()
def shift(net: nn.Module) -> None:
    net.layer1.bn2.running_mean += net.layer1.bn2.running_var.sqrt()


def set_nan(net: nn.Module) -> None:
    net.layer1.bn2.running_var[3] = float("nan")


@torch.no_grad()
def kill(net: nn.Module) -> None:
    net.layer1.conv2.weight[:4] = 0
    # those behind it have been trained with it
    old = {name: value.clone() for name, value in net.layer1.bn2.state_dict().items()}
    estimate_population_statistics(net.train(), batches(8, seed=5), 8, progress=False)
    net.layer1.bn2.load_state_dict(old)


def freeze(net: nn.Module) -> None:
    shift(net)
    net.train()
    net.layer1.bn2.eval()
    # those behind it have been trained with it
    estimate_population_statistics(net, batches(8, seed=5), 8, progress=False)


PLANTS: dict[str, Callable[[nn.Module], Any]] = {
    "identity-statistics": lambda net: net.layer1.bn2.reset_running_stats(),
    "stale-statistics": shift,
    "non-finite": set_nan,
    "impossible-variance": lambda net: net.layer1.bn2.running_var[3].fill_(-0.5),
    "dead-channels": kill,
    "mixed-modes": freeze,
}


@pytest.mark.parametrize("kind", PLANTS)
def test_a_defect_of_one_layer_is_found_there_and_nowhere_else(kind: str) -> None:
    net = healthy()
    PLANTS[kind](net)
    diagnosis = diagnose(net, batches())
    found = [f for f in diagnosis.of(kind, "layer1.bn2") if f.severity != "ok"]
    assert found and found[0].severity == "severe"
    assert "estimate_population_statistics(" in found[0].remedy
    assert {layer for _, layer, _ in bad(diagnosis)} <= {"layer1.bn2", ""}
    assert found[0] in diagnosis.severe and diagnosis.findings[0].severity == "severe"


def test_small_batches_are_named_by_their_worth() -> None:
    # without the pixels' noise, an image is worth little more than one sample
    flat = [x.mean((2, 3), keepdim=True) + 0.2 * x for x in batches(40, images=2)]
    net = healthy()
    estimate_population_statistics(net.train(), flat, 40, progress=False)
    diagnosis = diagnose(net, flat)
    worst = diagnosis.of("small-batch", "layer2.bn2")[0]
    assert worst.severity in ("warning", "severe") and 2 <= worst.evidence["samples"] < 16
    assert worst.evidence["rows"] == 2 and "SyncBN" in worst.remedy


def test_one_coarse_level_does_not_make_a_batch_small() -> None:
    torch.manual_seed(0)
    data = [torch.randn(12, 8, 8, 8) for _ in range(20)]
    forward = lambda norm, x: norm([x, x[..., :4, :4], x.mean((2, 3), keepdim=True)])  # noqa: E731
    norm = MultiDomainBatchNorm2d(8, 3, train_stats=D, population_stats=D)
    estimate_population_statistics(norm, data, forward=forward, progress=False)
    (finding,) = diagnose(norm, data, forward=forward, output_batches=0).of("small-batch")
    # 768, 192 and 12 samples: 3 / (1 / 768 + 1 / 192 + 1 / 12)
    assert finding.severity == "note" and finding.evidence["samples"] == pytest.approx(33, rel=0.2)


def test_batches_of_one_kind_of_image_are_dependent() -> None:
    images = torch.cat(batches())
    brightness = images.mean((1, 2, 3)).argsort()
    grouped = list(images[brightness].split(64))
    order = torch.randperm(len(grouped), generator=torch.Generator().manual_seed(0)).tolist()
    diagnosis = diagnose(healthy(), [grouped[i] for i in order])
    first = diagnosis.of("dependent-samples", "bn")[0]
    assert first.severity in ("warning", "severe") and first.evidence["variance_ratio"] > 2


def test_another_domain_is_told_from_the_source() -> None:
    net = healthy()
    dark = [x * 0.5 - 1 for x in batches(seed=7)]
    diagnosis = diagnose(net, batches(), target_batches=dark)
    assert diagnosis.of("domain-shift", "bn")[0].severity == "severe"
    assert {kind for kind, _, _ in bad(diagnosis)} <= {"domain-shift", "output-effect"}
    assert not bad(diagnose(net, batches(), target_batches=batches(seed=8)))


S, D = "shared", "domain_specific"


class Levels(nn.Module):
    """A head on three levels whose features differ, or not."""

    def __init__(self, norm: nn.Module, apart: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.norm, self.apart = norm, apart

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.stem(x)
        levels = [y * (1 + self.apart * i) + self.apart * i for i in range(3)]
        cycles = isinstance(self.norm, CycleBatchNorm2d)
        with self.norm.cycle() if cycles else contextlib.nullcontext():
            at_once = isinstance(self.norm, (MultiDomainBatchNorm2d, MABN2d))
            levels = self.norm(levels) if at_once else [self.norm(level) for level in levels]
        return [self.conv(level.relu()) for level in levels]


ROWS = [
    MultiDomainBatchNorm2d(8, 3, train_stats=train, population_stats=population, affine=affine)
    for train, population, affine in (
        [S, S, S], [S, D, S], [D, S, S], [D, D, S], [D, S, D], [D, D, D],
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("norm", "at_odds"),
    [
        *zip(ROWS, (False, True, True, False, True, False), strict=True),
        (CycleBatchNorm2d(8, 3), False),
        (nn.BatchNorm2d(8), True),
        (MABN2d(8, simulated_batch_size=64, batch_size=64), False),
    ],
    ids=["row1", "row2", "row3", "row4", "row5", "row6", "cycle", "torch", "mabn"],
)
@pytest.mark.parametrize("moving", [False, True])
def test_levels_that_share_by_mistake_are_told_from_those_that_do_not(
    norm: nn.Module, at_odds: bool, moving: bool
) -> None:
    norm.reset_running_stats()
    net = Levels(norm, 0.5).train()
    if moving:
        with torch.no_grad():
            for x in batches(60, seed=3):
                net(x)
    else:
        estimate_population_statistics(net, batches(8, seed=3), 8, progress=False)
    diagnosis = diagnose(net, batches(10))
    (finding,) = diagnosis.of("repeated-use", "norm")
    assert finding.evidence["apart"] > 0.2 and finding.evidence["uses"] == 3
    if at_odds:
        assert finding in diagnosis.severe and "MultiDomainBatchNorm2d" in finding.remedy
    else:
        assert not bad(diagnosis)


def test_several_uses_that_are_alike_are_no_finding() -> None:
    net = Levels(nn.BatchNorm2d(8), 0.0)
    estimate_population_statistics(net, batches(8, seed=3), 8, progress=False)
    assert not bad(diagnose(net, batches(10)))


def test_what_changes_nothing_in_the_output_is_not_severe() -> None:
    net = healthy().train()
    with torch.no_grad():
        net.layer1.bn2.weight.mul_(0.01)
    estimate_population_statistics(net, batches(8, seed=5), 8, progress=False)
    shift(net)
    diagnosis = diagnose(net, batches())
    (finding,) = diagnosis.of("stale-statistics", "layer1.bn2")
    assert finding.severity == "warning" and finding.evidence["distance"] > 0.5
    assert finding.evidence["output_change"] < 0.1
    assert not diagnosis.severe


def test_what_is_printed_has_a_line_for_each_cause() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(12) for m in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())]
    net = nn.Sequential(*layers).train()
    net[4].running_mean += 1
    diagnosis = diagnose(net, batches(4), output_batches=0)
    lines = str(diagnosis).splitlines()
    loud = [f for f in diagnosis.findings if f.severity != "ok"]
    assert len(lines) <= 3 + len({f.kind for f in loud}) and "few batches" in lines[1]
    (line,) = [line for line in lines if "identity-statistics" in line]
    count = sum(f.kind == "identity-statistics" for f in loud)
    assert line.startswith("severe") and f"{count} layers" in line
    verbose = diagnosis.as_text(verbose=True)
    assert all(f.layer in verbose and f.kind in verbose for f in loud)
    assert "few batches" not in str(diagnose(healthy(), batches(20, 8)))


def test_the_result_can_be_printed_saved_and_drawn(tmp_path: Path) -> None:
    net = healthy()
    set_nan(net)
    diagnosis = diagnose(net, batches(6))
    diagnosis.to_json(tmp_path / "d.json")
    content = json.loads((tmp_path / "d.json").read_text())
    assert content["findings"][0]["severity"] == "severe" and content["layers"][0] == "bn"
    assert {f["kind"] for f in content["findings"]} <= set(KINDS)
    pytest.importorskip("matplotlib")
    diagnosis.plot(tmp_path / "d.png")
    assert (tmp_path / "d.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.json", "d.png"]
