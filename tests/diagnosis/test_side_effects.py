"""A diagnosis changes nothing, and says the same on every rank and for every kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from rethinking_bn.diagnosis import diagnose
from rethinking_bn.layers import BatchNorm2d, BatchStatNorm2d, MABN2d, SyncBatchNorm2d
from rethinking_bn.population import estimate_population_statistics
from tests.diagnosis.cases import batches, healthy
from tests.helpers import run_distributed
from tests.population.cases import Snapshot


def broken(net: nn.Module) -> nn.Module:
    """Whatever a diagnosis may meet: NaN, a negative variance, mixed modes, a stale layer."""
    net.layer1.bn1.running_mean[0] = float("nan")
    net.layer1.bn2.running_var[1] = -1
    net.layer2.bn1.running_mean += 5
    net.train()
    net.layer2.bn2.eval()
    return net


@pytest.mark.parametrize("prepare", [lambda net: net.eval(), lambda net: net.train(), broken])
def test_nothing_is_left_behind(prepare: Callable[[nn.Module], nn.Module]) -> None:
    net = prepare(healthy())
    data = batches(4)
    data[2][0, 0, 0, 0] = float("inf")
    before = Snapshot(net)
    diagnosis = diagnose(net, data, target_batches=batches(3, seed=2))
    before.assert_unchanged()
    (finding,) = diagnosis.of("non-finite", "bn")
    assert finding.evidence["batches"] == 1 and finding in diagnosis.severe
    assert torch.isinf(data[2][0, 0, 0, 0])


@pytest.mark.parametrize("fails_at", [0, 2, 6])
def test_nothing_is_left_behind_after_an_exception(fails_at: int) -> None:
    net = broken(healthy())
    before = Snapshot(net)
    calls = 0

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        torch.rand(1)
        result = model(batch)
        if calls > fails_at:  # 6 is among the output effects
            raise KeyboardInterrupt
        return result

    with pytest.raises(KeyboardInterrupt):
        diagnose(net, batches(4), forward=forward)
    before.assert_unchanged()


def test_the_same_data_give_the_same_diagnosis() -> None:
    net = nn.Sequential(healthy(), nn.Dropout(0.3)).train()
    one, two = (diagnose(net, batches(4)).to_dict()["findings"] for _ in range(2))
    assert one == two


KINDS = {
    "ours": BatchNorm2d,
    "sync": SyncBatchNorm2d,
    "mabn": lambda c: MABN2d(c, simulated_batch_size=64, batch_size=64),
    "torchvision": FrozenBatchNorm2d,
    "torch-sync": nn.SyncBatchNorm,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [False, True])
def test_identity_statistics_of_every_kind_of_layer_are_found(kind: str, train: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), KINDS[kind](8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        net[0].weight.mul_(4)
    net.train(train)
    before = Snapshot(net)
    diagnosis = diagnose(net, batches(6))
    before.assert_unchanged()
    assert diagnosis.of("identity-statistics", "1")[0] in diagnosis.severe
    if kind != "torchvision":
        estimate_population_statistics(net.train(), batches(6), 6, progress=False)
        after = diagnose(net.train(train), batches(6, seed=1))
        assert {f.severity for f in after.findings} <= {"ok"}


def test_statistics_folded_into_a_frozen_affine_are_no_finding() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), FrozenBatchNorm2d(16))
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-1, 1, 16)[:, None, None, None])
        net[1].weight.copy_(torch.logspace(1, -1, 16) * (0.5 + torch.rand(16)))
    (finding,) = diagnose(net, batches(6)).of("identity-statistics", "1")
    assert finding.severity == "ok" and finding.evidence["folded"]


def test_layers_without_stored_statistics_are_judged_by_their_batches() -> None:
    torch.manual_seed(0)
    for norm in (BatchStatNorm2d(8), nn.BatchNorm2d(8, track_running_stats=False)):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
        diagnosis = diagnose(net, batches(6))
        assert not diagnosis.of("identity-statistics") and not diagnosis.of("stale-statistics")
        assert diagnosis.of("small-batch", "1")[0].severity == "ok"


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        (batches(1), {}, "at least two batches"),
        (batches(3), {"num_batches": 4}, "ended after 3 of 4"),
        *((batches(3), {"num_batches": bad}, "num_batches") for bad in (1, 0, True)),
        ([{"image": x} for x in batches(2)], {}, "forward="),
        ((x for x in batches(2)), {}, "generator.* has no length"),
        (batches(3), {"forward": lambda model, x: diagnose(model, batches(3))}, "running"),
    ],
)
def test_user_errors_are_named(data: Any, options: dict[str, Any], said: str) -> None:
    net = healthy()
    before = Snapshot(net)
    with pytest.raises((ValueError, RuntimeError), match=said):
        diagnose(net, data, **options)
    before.assert_unchanged()


def test_a_lazy_layer_is_refused_and_a_generator_taken() -> None:
    with pytest.raises(ValueError, match="lazy"):
        diagnose(nn.Sequential(nn.LazyBatchNorm2d()), batches(3))
    assert diagnose(healthy(), (x for x in batches(3)), num_batches=3).batches == 3


def test_a_model_without_batch_norm_or_a_layer_without_values_is_named(caplog) -> None:
    diagnosis = diagnose(nn.Sequential(nn.Conv2d(3, 2, 1), nn.GroupNorm(1, 2)), batches(2))
    assert not diagnosis.findings and "no BN-like layer" in caplog.text
    net = healthy()
    net.spare = nn.BatchNorm2d(3)
    diagnosis = diagnose(net, batches(3))
    assert diagnosis.unreached == ("spare",) and "spare" in str(diagnosis)


def test_pairs_with_labels_and_outputs_of_ones_own() -> None:
    net = healthy()
    net.layer2.bn2.running_mean += 3
    pairs = [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches(4)]
    changes = [
        diagnose(net, pairs, output=output).of("output-effect", "")[0].evidence["stored_to_exact"]
        for output in (None, lambda logits: logits[:, :2])
    ]
    assert changes[0] != changes[1] and min(changes) > 0.1
    assert not diagnose(net, pairs, output_batches=0).of("output-effect")


def _rank(rank: int, world: int, uneven: bool) -> tuple[str, int, float]:
    net = healthy()
    net.layer2.bn1.running_mean += 2
    data = batches(8)[rank::world]
    found = diagnose(net, data[:3] if uneven and rank == 1 else data)
    (finding,) = found.of("stale-statistics", "layer2.bn1")
    return str(found.to_dict()["findings"]), found.batches, finding.evidence["distance"]


@pytest.mark.parametrize("uneven", [False, True])
def test_several_ranks_give_one_diagnosis(uneven: bool) -> None:
    one, two = run_distributed(_rank, 2, 2, uneven)
    assert one == two and one[1] == (6 if uneven else 8)
    if not uneven:
        assert _rank(0, 1, False)[2] == pytest.approx(one[2], rel=1e-4)
