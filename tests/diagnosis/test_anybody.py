"""Other people's layers are judged by what they do, and every remedy runs as printed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rethinking_bn.layers
import rethinking_bn.population
from rethinking_bn.diagnosis import Diagnosis, diagnose
from rethinking_bn.population import estimate_population_statistics, freeze_batch_norm
from tests.diagnosis.cases import batches, healthy
from tests.population.cases import FirstHalf, Masked


def run_remedies(diagnosis: Diagnosis, **names: Any) -> set[str]:
    """Run all code that a diagnosis prints; return what was run."""
    public = {
        name: getattr(module, name)
        for module in (rethinking_bn.layers, rethinking_bn.population)
        for name in module.__all__
    }
    text = "".join(diagnosis.as_text(verbose=True).split())
    code = [c for f in diagnosis.findings for c in re.findall("`([^`]*)`", f.remedy)]
    for line in code:
        eval(line, {**public, **names})
        assert "".join(line.split()) in text
    return set(code)


class Frozen(nn.Module):
    """A constant BatchNorm as the original DETR has it, and others: without ``eps``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0)):
            self.register_buffer(name, torch.full((channels,), value))
        self.register_buffer("running_var", torch.ones(channels) - 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def severities(diagnosis: Diagnosis, kind: str) -> set[str]:
    return {f.severity for f in diagnosis.of(kind)}


def test_a_masked_layer_is_compared_by_what_it_leaves_in_its_buffers() -> None:
    torch.manual_seed(0)
    layer, data = Masked(6), []
    for _ in range(30):
        mask = (torch.arange(20) < torch.randint(3, 20, (8, 1))).float()[:, None]
        data.append(((2 * torch.randn(8, 6, 20) + 3) * mask, mask))
    frames = torch.cat([x.transpose(1, 2)[mask[:, 0] > 0] for x, mask in data])
    layer.running_mean.copy_(frames.mean(0))
    layer.running_var.copy_(frames.var(0))

    def run() -> Diagnosis:
        return diagnose(layer, data, forward=lambda model, batch: model(*batch))

    assert {f.severity for f in run().findings} <= {"ok"}
    layer.running_mean += 2
    assert severities(run(), "stale-statistics") == {"severe"}


def test_a_layer_that_inference_does_not_call_is_not_accused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), FirstHalf(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    data = [torch.cat([x, 3 * x + 2]) for x in batches(10, images=8)]
    clean = torch.cat([net[0](x[:8]) for x in data]).detach()
    net[1].running_mean.copy_(clean.mean((0, 2, 3)))
    net[1].running_var.copy_(clean.var((0, 2, 3)))
    diagnosis = diagnose(net, data)
    assert {f.layer for f in diagnosis.findings} >= {"1", "1.second"}
    assert not diagnosis.severe and severities(diagnosis, "stale-statistics") == {"ok"}
    assert not diagnosis.of("identity-statistics", "1.second")


def test_constant_layers_without_eps_are_judged_and_thawed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Frozen(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).train()
    model[1].running_mean += 2
    diagnosis = diagnose(model, batches(8))
    assert severities(diagnosis, "mixed-modes") == {"severe"}
    code = run_remedies(diagnosis, model=model, batches=batches(8))
    assert "estimate_population_statistics(model, batches, 8, thaw=True)" in code
    assert not diagnose(model, batches(8)).severe


def test_the_remedies_of_a_constant_identity_do_not_lead_in_a_circle() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Frozen(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).train()
    model[0].weight.data *= 4
    diagnosis = diagnose(model, batches(8))
    assert severities(diagnosis, "identity-statistics") == {"severe"}
    run_remedies(diagnosis, model=model, batches=batches(8))
    assert isinstance(model[1], nn.BatchNorm2d) and not diagnose(model, batches(8)).severe


def test_a_layer_whose_tracking_was_switched_off_is_judged_by_its_buffers() -> None:
    model = healthy().train()
    model.bn.track_running_stats = False
    assert not diagnose(model, batches(8)).severe
    model.bn.running_mean += 2
    diagnosis = diagnose(model, batches(8))
    assert diagnosis.of("stale-statistics", "bn")[0] in diagnosis.severe
    run_remedies(diagnosis, model=model, batches=batches(8))
    assert not diagnose(model, batches(8)).severe


@pytest.mark.parametrize("how", ["named", "eval mode", "eval model", "target"])
def test_remedies_run_as_printed(how: str) -> None:
    model, other = healthy().train(how != "eval model"), [x * 0.5 - 1 for x in batches(8)]
    if how == "named":
        freeze_batch_norm(model)
    elif how == "eval mode":
        model.layer1.bn2.eval()
    model.layer1.bn2.running_mean += 3
    model.layer2.bn1.running_var[2] = -1
    diagnosis = diagnose(model, batches(8), target_batches=other if how == "target" else None)
    assert diagnosis.severe
    if how == "named":
        assert diagnosis.of("mixed-modes", "layer1.bn2")[0] in diagnosis.severe
        assert not diagnosis.of("small-batch"), "frozen layers use no batch"
    run_remedies(diagnosis, model=model, batches=batches(8), target_batches=other)
    if how != "target":
        assert not diagnose(model, batches(8)).severe
        assert how == "eval model" or model.layer1.bn2.training is False
        assert how != "named" or model.train().bn.training is False


def test_a_network_called_twice_is_sent_to_layers_that_can_be() -> None:
    def forward(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        return net(x), net(2 * x + 3)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train()
    estimate_population_statistics(model, batches(8), forward=forward, progress=False)
    diagnosis = diagnose(model, batches(8), forward=forward)
    (finding,) = diagnosis.of("repeated-use")
    assert finding in diagnosis.severe and "Table 5" not in finding.remedy
    code = run_remedies(diagnosis, model=model, batches=batches(8), forward=forward)
    assert {"CycleBatchNorm2d(8, 2)", "SplitBatchNorm2d(8, 2)"} <= code


def trained(momentum: float) -> nn.Module:
    """A network whose statistics are a moving average over small batches, weights fixed."""
    model = healthy().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    with torch.no_grad():
        for x in batches(60, images=8, seed=3):
            model(x)
    return model


def test_a_momentum_that_keeps_one_batch_is_named_and_a_usual_one_is_fine() -> None:
    data = batches(40, images=8)
    diagnosis = diagnose(trained(0.99), data)
    stale = [f for f in diagnosis.of("stale-statistics") if f.severity == "warning"]
    assert stale and "momentum 0.99: the average holds one batch" in stale[0].what
    assert "momentum 0.01" in stale[0].remedy and stale[0].evidence["output_change"] > 0.02
    assert stale[0].evidence["distance"] > 0.15
    (line,) = [x for x in str(diagnosis).splitlines() if "stale-statistics" in x]
    assert "layers, worst" in line
    assert severities(diagnose(trained(0.1), data), "stale-statistics") == {"ok"}


def levels(images: Tensor, norms: nn.ModuleList, convs: nn.ModuleList) -> None:
    xs = [images, nn.functional.avg_pool2d(images, 8), nn.functional.avg_pool2d(images, 16)]
    for conv, norm in zip(convs, norms, strict=True):
        xs = [y.relu() for y in norm([conv(x) for x in xs])]


@pytest.mark.parametrize("guilty", [False, True])
def test_images_are_not_accused_of_what_another_layer_mixes(guilty: bool) -> None:
    """A head of row 1 on images whose contrast differs most: its second norm sees them mixed."""
    for seed in range(3):
        torch.manual_seed(seed)
        images = torch.randn(200, 3, 32, 32) * (0.2 + 3 * torch.rand(200, 1, 1, 1)) + 2
        model = nn.ModuleList(
            [
                nn.ModuleList(rethinking_bn.layers.MultiDomainBatchNorm2d(8, 3) for _ in range(2)),
                nn.ModuleList(nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8)),
            ]
        ).train()
        chosen = torch.randint(200, (40, 2 if guilty else 4))
        data = [images[torch.cat([i, i]) if guilty else i] for i in chosen]
        diagnosis = diagnose(
            model, data, forward=lambda m, x: levels(x, m[0], m[1]), output_batches=0
        )
        found = [f for f in diagnosis.of("dependent-samples") if f.severity != "ok"]
        assert bool(found) == guilty
        assert all("shuffle" in f.remedy for f in found)


def test_what_is_left_alone_is_named_and_a_healthy_network_fits_a_screen() -> None:
    class Activated(Frozen):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    model = healthy()
    model.layer1.shortcut = nn.Sequential(model.layer1.shortcut, Activated(12))
    lines = str(diagnose(model, batches(20))).splitlines()
    assert len(lines) <= 5 and "layer1.shortcut.1 (Activated): " in lines[-1]
