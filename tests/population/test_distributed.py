"""Population training on several gloo processes, against one process and against failures."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import FrozenBatchNorm2d

from rethinking_bn.layers import MultiDomainBatchNorm2d, SyncBatchNorm2d
from rethinking_bn.population import PopulationReport, estimate_population_statistics
from tests.helpers import run_distributed
from tests.population.cases import Snapshot
from tests.population.test_side_effects import raising_loader

NUM_BATCHES = 3


def images(rank: int, batch: int) -> Tensor:
    """Every rank has other images, other numbers of them and other sizes: (N, 3, H, 5)."""
    generator = torch.Generator().manual_seed(10 * rank + batch)
    n = 1 + (rank + 2 * batch) % 3
    return torch.randn(n, 3, 4 + rank, 5, generator=generator) * (1 + rank) + 5 * rank - batch


def levels(rank: int, batch: int) -> list[Tensor]:
    """Three feature levels; rank 1 has nothing on the last one, and in batch 2 nothing at all."""
    xs = [images(rank, batch + 5 * level) for level in range(3)]
    empty = [rank == 1 and (level == 2 or batch == 2) for level in range(3)]
    return [x[:0] if skip else x for x, skip in zip(xs, empty, strict=True)]


def plain_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)
    )


def sync_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(SyncBatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), SyncBatchNorm2d(4))


class LevelNet(nn.Module):
    """Two layers of a head over all levels."""

    def __init__(self, population_stats: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 1)
        self.first, self.second = (
            MultiDomainBatchNorm2d(3, 3, population_stats=population_stats, sync=True)
            for _ in range(2)
        )

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return self.second([self.conv(x).relu() for x in self.first(xs)])


def thawed_net() -> nn.Module:
    net = plain_net()
    for index in (0, 2, 4):
        net[index] = FrozenBatchNorm2d(net[index].num_features)  # type: ignore[index,operator]
    return net


Result = tuple[dict[str, Tensor], PopulationReport]


def estimate_on_rank(rank: int, build: Callable[[], nn.Module], inputs: Any) -> Result:
    model = build()
    # statistics that differ between ranks must not survive
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.fill_(1.0 + rank)
    batches = [inputs(rank, index) for index in range(NUM_BATCHES)]
    report = estimate_population_statistics(model, batches, NUM_BATCHES, thaw=True)
    return dict(model.state_dict()), report


CASES_OF_DATA: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Any]]] = {
    "plain": (plain_net, images),
    "thawed": (thawed_net, images),
    "synced": (sync_net, images),
    "shared": (partial(LevelNet, "shared"), levels),
    "domain_specific": (partial(LevelNet, "domain_specific"), levels),
}


def estimate_all(rank: int) -> dict[str, Result]:
    return {name: estimate_on_rank(rank, *case) for name, case in CASES_OF_DATA.items()}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Result]]:
    """What each rank got for each model; processes are started once for all of them."""
    return run_distributed(estimate_all, request.param)


def agreed(ranks: list[dict[str, Result]], name: str) -> Result:
    """Defect 4: with fvcore every rank ends with other statistics."""
    for one in ranks[1:]:
        torch.testing.assert_close(one[name][0], ranks[0][name][0], rtol=0, atol=0)
        samples = [[r.samples for r in rank[name][1].layers] for rank in (one, ranks[0])]
        assert samples[0] == samples[1]
    return ranks[0][name]


@pytest.mark.parametrize("name", ["plain", "thawed"])
def test_plain_layers_equal_one_process_after_the_other(
    ranks: list[dict[str, Result]], name: str
) -> None:
    world, (state, remote) = len(ranks), agreed(ranks, name)
    model = CASES_OF_DATA[name][0]()
    for key, buffer in model.named_buffers():
        if "running" in key:
            buffer.fill_(2.0)
    batches = [images(rank, index) for rank in range(world) for index in range(NUM_BATCHES)]
    report = estimate_population_statistics(model, batches, len(batches), thaw=True)
    torch.testing.assert_close(state, dict(model.state_dict()), rtol=1e-6, atol=1e-6)
    assert [r.samples for r in remote.layers] == [r.samples for r in report.layers]
    assert remote.world_size == world and remote.num_batches == NUM_BATCHES


def one_batch(world: int, inputs: Any, index: int) -> Any:
    """All ranks' inputs as one: rows with their pixels in a row, as sizes differ."""

    def flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([x.transpose(0, 1).flatten(1) for x in tensors], 1)[None, ..., None]

    parts = [inputs(rank, index) for rank in range(world)]
    if isinstance(parts[0], list):
        return [flat(list(level)) for level in zip(*parts, strict=True)]
    return flat(parts)


@pytest.mark.parametrize("name", ["synced", "shared", "domain_specific"])
def test_synced_layers_equal_one_process_with_all_data(
    ranks: list[dict[str, Result]], name: str
) -> None:
    state, remote = agreed(ranks, name)
    build, inputs = CASES_OF_DATA[name]
    model = build()
    batches = [one_batch(len(ranks), inputs, index) for index in range(NUM_BATCHES)]
    report = estimate_population_statistics(model, batches, NUM_BATCHES)
    torch.testing.assert_close(state, dict(model.state_dict()), rtol=1e-5, atol=1e-5)
    samples = [layer.samples for layer in report.layers]
    assert all(samples)
    assert [layer.samples for layer in remote.layers] == samples


class Detector(nn.Module):
    """Takes detectron2's dicts, notes the modes, and fails where it is told to."""

    def __init__(self, fail_at: int = -1, error: BaseException | None = None) -> None:
        super().__init__()
        self.net, self.modes = plain_net(), []  # type: ignore[var-annotated]
        self.fail_at, self.error = fail_at, error

    def forward(self, batch: Any) -> Any:
        self.modes.append(self.training)
        if isinstance(batch, list):
            batch = torch.cat([sample["image"] for sample in batch])
        y = self.net(batch)
        if len(self.modes) == self.fail_at + 1 and self.error is not None:
            raise self.error
        return y


def ddp_and_labels(rank: int) -> tuple[bool, list[bool], dict[str, Tensor], float]:
    """Rank 0 has labelled data, the others have none; the model is wrapped."""
    model = DistributedDataParallel(Detector())
    batch = [{"image": images(rank, 1)}]
    batches = [[{**batch[0], "instances": 1}] if rank == 0 else batch] * 2
    before = [(m, m.training) for m in model.modules()]
    report = estimate_population_statistics(model, batches, 2)
    assert all(module.training == mode for module, mode in before)
    return report.labelled, model.module.modes, dict(model.state_dict()), report.drift


def test_wrapped_model_and_a_rank_without_labels(two_ranks: list[Any]) -> None:
    results = [wrapped for wrapped, _ in two_ranks]
    for labelled, modes, state, drift in results:
        assert not labelled and modes == [False, False]
        torch.testing.assert_close(state, results[0][2], rtol=0, atol=0)
        assert drift == results[0][3]


# --- failures: none may hang, all ranks must hear of it, every model must be as before -----------


def failing(fail_at: int, error: BaseException) -> Callable[[int], Any]:
    """Let the forward of batch ``fail_at`` fail on rank 1."""

    def case(rank: int) -> Any:
        return Detector(fail_at if rank == 1 else -1, error), data(rank), 3

    return case


def data(rank: int, number: int = 3) -> list[Tensor]:
    return [images(rank, index) for index in range(number)]


def non_finite(rank: int) -> Any:
    batches = data(rank)
    batches[1][0, 2] *= float("inf") if rank == 1 else 1.0
    return Detector(), batches, 3


def other_layers(rank: int) -> Any:
    model = Detector()
    model.net[2].train(rank == 0)  # type: ignore[index]
    return model, data(rank), 3


# (model, batches, number) of a rank, what rank 0 raises, what rank 1 raises
CASES: list[tuple[Any, ...]] = [
    (
        lambda rank: (Detector(), data(rank, 1 if rank == 1 else 3), 3),
        "RuntimeError: another rank failed.*rank 1: .*ended after 1 of 3 batches",
        "ValueError: rank 1: the loader ended after 1 of 3 batches",
    ),
    (
        lambda rank: (
            Detector(),
            raising_loader(OSError("disk gone")) if rank == 1 else data(rank),
            3,
        ),
        "RuntimeError: another.*rank 1: the loader failed after 1 of 3 batches: OSError: disk gone",
        "RuntimeError: rank 1: the loader failed after 1 of 3 batches: OSError: disk gone",
    ),
    *(
        (failing(at, KeyError("gt_boxes")), "RuntimeError: another.*rank 1: KeyError: ", "KeyError")
        for at in (0, 2)
    ),
    (
        failing(1, KeyboardInterrupt("ctrl-c")),
        "RuntimeError: another.*rank 1: KeyboardInterrupt",
        "KeyboardInterrupt",
    ),
    (non_finite, *["FloatingPointError: net.0: 1 of 3"] * 2),
    (
        lambda rank: (Detector(), data(rank, 5), 2 + rank),
        *["ValueError: ranks disagree about num_batches: rank 0: 2; rank 1: 3"] * 2,
    ),
    (
        lambda rank: (Detector(), data(rank, 5), 2 - 3 * rank),
        "RuntimeError: another.*rank 1: ValueError: num_batches must be .* got -1",
        "ValueError: num_batches must be .* got -1",
    ),
    (other_layers, *["ValueError: ranks disagree about layers in training mode"] * 2),
]


def fail(rank: int) -> list[str]:
    """Run all cases and return what each raised on this rank, once the model proved unchanged."""
    raised = []
    for case, *_ in CASES:
        model, batches, num_batches = case(rank)
        before = Snapshot(model)
        try:
            estimate_population_statistics(model, batches, num_batches)
            raised.append("nothing")
        except BaseException as error:
            raised.append(f"{type(error).__name__}: {error}")
        before.assert_unchanged()
    # and after all that the ranks are still in step
    estimate_on_rank(rank, plain_net, images)
    return raised


def ddp_and_failures(rank: int) -> tuple[Any, list[str]]:
    return ddp_and_labels(rank), fail(rank)


@pytest.fixture(scope="module")
def two_ranks() -> list[tuple[Any, list[str]]]:
    return run_distributed(ddp_and_failures, 2)


def test_a_failure_on_one_rank_fails_all(two_ranks: list[Any]) -> None:
    first, second = (raised for _, raised in two_ranks)
    for case, (_, elsewhere, where_it_happened) in enumerate(CASES):
        assert re.match(elsewhere, first[case]), (elsewhere, first[case])
        assert re.match(where_it_happened, second[case]), (where_it_happened, second[case])


def fail_before_sync(rank: int) -> None:
    """Raise on rank 1 where rank 0 goes on to wait inside a synced layer."""

    def forward(model: nn.Module, x: Tensor) -> None:
        if rank == 1:
            raise KeyError("gt_boxes")
        model(x)

    estimate_population_statistics(sync_net(), [images(rank, 0)], 1, forward=forward)


def test_a_model_that_communicates_is_not_made_to_wait() -> None:
    """The failing process ends, and with it the other one's wait: no hang, no crossed messages."""
    with pytest.raises(RuntimeError, match="gt_boxes") as caught:
        run_distributed(fail_before_sync, 2, timeout=40)
    assert "KeyError" in str(caught.value)
