"""The key encoder and the teacher of docs/contrastive.md against their formulas."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rethinking_bn.layers import shuffle_rows
from tests.helpers import run_distributed

PAGE = Path(__file__).parents[2] / "docs" / "contrastive.md"
SEED = 11


@cache
def page() -> dict[str, Any]:
    """Return what the page defines, by name."""
    if not PAGE.exists():
        pytest.skip("docs/ is not installed")
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(code, names)
    return names


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    ).double()


def images(rank: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    shape = (count, 3, 8, 8)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + rank) + rank


def on_rank(rank: int, counts: list[int]) -> dict[str, Tensor]:
    groups = [dist.new_group([member]) for member in range(len(counts))]
    mine, net = images(rank, counts[rank]), encoder().train()
    keys = page()["encode_keys"](net, mine, seed=SEED)
    assert not keys.requires_grad

    # MoCo's form: gather all images, permute them, encode one share per rank, gather, take mine
    everything = torch.cat([images(r, count) for r, count in enumerate(counts)])
    order, _ = shuffle_rows(torch.arange(len(everything)), generator_seed=SEED, group=groups[rank])
    total, world = len(everything), len(counts)
    shares = [order[r * total // world : (r + 1) * total // world] for r in range(world)]
    gathered = keys.new_empty(total, 5)
    reference = [encoder().train() for _ in shares]
    for model, share in zip(reference, shares, strict=True):
        with torch.no_grad():
            gathered[share] = model(everything[share])
    first = sum(counts[:rank])
    running = reference[rank][1].running_mean
    alone = encoder().train()
    with torch.no_grad():
        unshuffled = alone(mine)
    return {
        "keys": keys,
        "gathered": gathered[first : first + counts[rank]],
        "mean": net[1].running_mean,
        "running": running,
        "unshuffled": unshuffled,
    }


@pytest.mark.parametrize("counts", [[4, 4], [5, 2]], ids=str)
def test_equals_the_gathered_form(counts: list[int]) -> None:
    for found in run_distributed(on_rank, len(counts), counts):
        torch.testing.assert_close(found["keys"], found["gathered"], rtol=0, atol=1e-12)
        torch.testing.assert_close(found["mean"], found["running"], rtol=0, atol=1e-12)
        assert not torch.allclose(found["keys"], found["unshuffled"], atol=1e-3)


def test_one_process_is_the_encoder_itself() -> None:
    x = images(0, 6)
    keys = page()["encode_keys"](encoder().train(), x, seed=SEED)
    with torch.no_grad():
        torch.testing.assert_close(keys, encoder().train()(x), rtol=0, atol=1e-12)


def test_a_teacher_normalises_by_its_moving_statistics() -> None:
    student = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double()
    teacher = page()["make_teacher"](student)
    weight = torch.ones(3, dtype=torch.float64)
    moving: list[list[Tensor]] = [[torch.zeros(c), torch.ones(c)] for c in (3, 4)]

    def normalized(x: Tensor, layer: int, fraction: float) -> Tensor:
        var, mean = torch.var_mean(x, (0, 2, 3))
        for i, new in enumerate((mean, var)):
            moving[layer][i] = (1 - fraction) * moving[layer][i] + fraction * new
        mean, var = (value.view(1, -1, 1, 1) for value in moving[layer])
        return (x - mean) / (var + 1e-5).sqrt()

    for step, fraction in enumerate((1.0, 0.5, 0.1)):
        x = images(step, 4)
        with torch.no_grad():
            student[0].weight.mul_(1.5)
        weight = 0.9 * weight + 0.1 * student[0].weight.detach()
        found = page()["teach"](teacher, student, x, decay=0.9, fraction=fraction)
        expected = normalized(x, 0, fraction) * weight.view(1, -1, 1, 1)
        expected = normalized(student[1](expected).detach(), 1, fraction)
        torch.testing.assert_close(found, expected)
    assert not found.requires_grad and student[0].num_batches_tracked == 0
