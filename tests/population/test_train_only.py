"""train_only: what is named is trained, everything else is bit for bit what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rethinking_bn.layers import BatchNorm2d, MABN2d, MultiDomainBatchNorm2d
from rethinking_bn.population import estimate_population_statistics, train_only


class Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = MultiDomainBatchNorm2d(
            4, 2, train_stats="shared", population_stats="domain_specific", affine="shared"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.bn([x, x[..., ::2, ::2]])
        return a + b.mean()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Levels(), MABN2d(4, batch_size=2), BatchNorm2d(4),
        nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip


def step(net: nn.Module) -> None:
    """One epoch as trainers have them: eval() and train() in between."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, 0.9)
    for _ in range(3):
        net.eval()
        net.train()
        net(torch.randn(2, 3, 4, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("patterns", "prefixes"),
    [(("4", "6"), ("4.", "6.")), (("2.*",), ("2.bn.",)), (("[13]",), ("1.", "3."))],
)
def test_the_rest_is_bit_equal(patterns: Any, prefixes: tuple[str, ...]) -> None:
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trained = train_only(net, patterns)
    assert trained == [n for n, _ in model().named_parameters() if n.startswith(prefixes)]
    step(net)
    estimate_population_statistics(net, [torch.randn(2, 3, 4, 4)], 1, labelled=True)
    changed = {n for n, v in net.state_dict().items() if not torch.equal(v, before[n])}
    assert changed and all(name.startswith(prefixes) for name in changed)
    assert set(trained) <= changed
    statistics = {n for n in before if n.startswith(prefixes) and "running" in n}
    assert statistics <= changed  # the named norms go on estimating theirs


def test_what_is_not_known_to_be_batch_norm_is_named(caplog: pytest.LogCaptureFixture) -> None:
    net = model()
    net.insert(0, torch.jit.script(nn.BatchNorm2d(3)))
    train_only(net, ["7"])
    assert "leaves alone 0" in caplog.text and "scripted" in caplog.text


def test_what_was_frozen_inside_stays_frozen_and_shared_parameters_are_trained() -> None:
    net = model()
    net[6].bias.requires_grad_(False)
    assert train_only(net, ["6"]) == ["6.weight"]
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    assert train_only(tied, ["1"]) == ["0.weight", "1.bias"]


@pytest.mark.parametrize(
    ("patterns", "said"), [(["6", "head*"], "matches 'head\\*'"), (["5"], "no parameter to train")]
)
def test_what_cannot_be_followed_changes_nothing(patterns: list[str], said: str) -> None:
    net = model()
    with pytest.raises(ValueError, match=said):
        train_only(net, patterns)
    assert all(p.requires_grad for p in net.parameters())
    net.train()
    assert all(module.training for module in net.modules())
