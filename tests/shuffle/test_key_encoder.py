"""The key encoder of docs/contrastive.md equals the encoder on what a gather would have mixed."""

from __future__ import annotations

import re
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


def encode_keys() -> Any:
    """Return the function that the page shows."""
    if not PAGE.exists():
        pytest.skip("docs/ is not installed")
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    return names["encode_keys"]


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
    keys = encode_keys()(net, mine, seed=SEED)
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
    keys = encode_keys()(encoder().train(), x, seed=SEED)
    with torch.no_grad():
        torch.testing.assert_close(keys, encoder().train()(x), rtol=0, atol=1e-12)
