"""Loaders as they are: pairs of inputs and labels, without a number, unequal, nested runs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from rethinking_bn.averaging import AveragedWeights
from rethinking_bn.diagnosis import diagnose
from rethinking_bn.population import estimate_population_statistics, inputs_of
from tests.helpers import run_distributed
from tests.population.cases import Snapshot, assert_statistics, images

IMAGE = torch.rand(2, 3, 4, 4)
MAPS = [torch.rand(3, 4, 4), torch.rand(3, 5, 4)]
BYTES = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([1, 0]),
        torch.zeros(2, 4, 4, dtype=torch.long),
        torch.zeros(2, 5, dtype=torch.bool),
        [1, 0],
        3,
        {"boxes": torch.rand(1, 4)},
        [{"boxes": torch.rand(1, 4)}, {}],
    ],
)
@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("inputs", [IMAGE, MAPS, BYTES], ids=["tensor", "list", "bytes"])
def test_inputs_and_labels(labels: Any, kind: Any, inputs: Any) -> None:
    assert inputs_of(kind((inputs, labels))) is inputs


@pytest.mark.parametrize(
    "batch",
    [
        IMAGE,
        (IMAGE, IMAGE),
        MAPS,
        [BYTES, BYTES],
        (IMAGE, torch.tensor([0.5, 0.1])),
        (IMAGE, "name"),
        (IMAGE, torch.tensor([1]), torch.tensor([2])),
        [{"image": IMAGE}, {"image": IMAGE}],
        {"pixels": IMAGE},
        ("a", 1),
        ([], 1),
    ],
)
def test_everything_else_is_the_models_business(batch: Any) -> None:
    assert inputs_of(batch) is batch


def net() -> Any:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))


def test_a_data_loader_of_pairs_without_a_number() -> None:
    data = torch.randn(10, 3, 4, 4)
    loader = DataLoader(TensorDataset(data, torch.arange(10)), batch_size=4)
    model = net()
    report = estimate_population_statistics(model, loader)
    assert_statistics(model[0], [data])
    assert report.num_batches == 3
    average = AveragedWeights(net(), statistics="estimate")
    average.estimate_statistics(loader)
    assert_statistics(average.module[0], [data])


@pytest.mark.parametrize(
    "batch, example",
    [
        ((IMAGE, IMAGE), r"model\(batch\[0\]\)"),
        ([IMAGE, torch.rand(2)], r"model\(batch\[0\]\)"),
        ({"pixels": IMAGE}, r"model\(\*\*batch\)"),
    ],
)
def test_what_cannot_be_called_names_forward_with_an_example(batch: Any, example: str) -> None:
    model = net()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=rf"forward=lambda model, batch: {example}"):
        estimate_population_statistics(model, [batch] * 2, 2)
    before.assert_unchanged()


def test_targets_are_for_a_model_that_wants_none() -> None:
    def like_torchvisions_detectors(module: nn.Module, inputs: Any) -> None:
        assert not module.training, "targets should not be None"

    model, x = net(), images(2)[0]
    model.register_forward_pre_hook(like_torchvisions_detectors)
    batches = [(x, [{}, {}])]
    with pytest.raises(ValueError, match=r"forward=lambda model, batch: model\(\*batch\)"):
        estimate_population_statistics(model, batches)
    estimate_population_statistics(model, batches, labelled=False)
    assert_statistics(model[0], [x])


def test_an_error_of_the_models_own_stays_what_it_is() -> None:
    def fail(module: Any, args: Any) -> None:
        raise TypeError("mine")

    model = net()
    model.register_forward_pre_hook(fail)
    with pytest.raises(TypeError, match="^mine$"):
        estimate_population_statistics(model, images(2), 1)


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.randn(3, 4, 4)


NO_LENGTH = "num_batches.*length"


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        (iter([IMAGE]), NO_LENGTH), (DataLoader(Endless(), batch_size=2), NO_LENGTH), ([], "empty")
    ],
)  # fmt: skip
def test_a_loader_of_unknown_length_or_none_is_refused(loader: Any, said: str) -> None:
    model = net()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=said):
        estimate_population_statistics(model, loader)
    before.assert_unchanged()


def unequal(rank: int) -> tuple[int, dict[str, Tensor]]:
    model = net()
    report = estimate_population_statistics(model, images(2, 3, 4)[: 3 - rank])
    return report.num_batches, dict(model.state_dict())


def test_ranks_of_unequal_length_stop_together() -> None:
    (first, state), (second, other) = run_distributed(unequal, 2)
    assert first == second == 2
    model = net()
    estimate_population_statistics(model, images(2, 3) * 2)
    for name in ("0.running_mean", "0.running_var"):
        assert torch.equal(state[name], other[name])
        torch.testing.assert_close(state[name], model.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_an_estimate_within_an_estimate_is_refused() -> None:
    """Defect 48: wrong statistics, without a word."""
    model = net()
    before = Snapshot(model)
    for inner in (model, model[0]):

        def forward(module: Any, batch: Tensor, inner: Any = inner) -> None:
            estimate_population_statistics(inner, [batch], 1, progress=False)

        with pytest.raises(RuntimeError, match="another population training"):
            estimate_population_statistics(model, images(2), 1, forward=forward)
        before.assert_unchanged()
    estimate_population_statistics(model, images(2), 1)  # and it is free again


def refused(rank: int) -> list[str]:
    """Let rank 1 alone nest runs of one model; rank 0 runs another model meanwhile, or none."""
    said = []
    for run in (estimate_population_statistics, diagnose):
        for beside in (True, False):
            model, other = net(), net()
            before = Snapshot(model)

            def forward(module: Any, batch: Tensor, inner: Any, also: bool) -> Any:
                if rank == 1 or also:
                    estimate_population_statistics(inner, [batch], 1, progress=False)
                return module(batch)

            given = partial(forward, inner=model if rank == 1 else other, also=beside)
            with pytest.raises(RuntimeError) as caught:
                run(model, images(2, 3), forward=given)
            said.append(str(caught.value))
            before.assert_unchanged()
    estimate_population_statistics(net(), images(2), 1)  # the ranks are in step
    return said


def test_a_run_that_one_rank_refuses_fails_all() -> None:
    first, second = run_distributed(refused, 2, timeout=60)
    assert len(first) == len(second) == 4
    assert all("rank 1: RuntimeError: another population training" in text for text in first)
    assert all(text.startswith("another population training") for text in second)


def test_an_estimate_in_a_second_thread_is_refused_and_the_first_goes_on() -> None:
    """Defect 48: momentum 1.0 stays."""
    model, errors = net(), []

    def forward(module: Any, batch: Tensor) -> None:
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(estimate_population_statistics, model, images(3), 1)
            errors.append(str(second.exception()))
        module(batch)

    estimate_population_statistics(model, images(2), 1, forward=forward)
    assert len(errors) == 1 and "another population training" in errors[0]
    assert_statistics(model[0], images(2))
    assert model[0].momentum == 0.1
