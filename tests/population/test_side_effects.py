"""Population training changes statistics and nothing else; when it fails, nothing at all."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rethinking_bn.layers import MultiDomainBatchNorm2d, SyncBatchNorm2d
from rethinking_bn.population import estimate_population_statistics
from tests.population.cases import Snapshot, images, small_net

# --- side effects ---------------------------------------------------------------------------------


class Stateful(nn.Module):
    """A detector in miniature: losses from labelled data, and state that training moves."""

    seen: Tensor
    scratch: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.modes: list[tuple[bool, ...]] = []
        self.interrupt: BaseException | None = None

    def forward(self, batch: Any) -> Any:
        if isinstance(batch, list):
            batch = torch.cat([sample["image"] for sample in batch])
        modes = (self.training, self.net[4].training, self.net[6].training)
        self.modes.append(modes)
        self.seen += 1
        self.scratch = self.scratch + 1
        self.register_buffer("late", torch.ones(1))
        self.calls = getattr(self, "calls", 0) + 1
        self.loss_normalizer = 0.9 * getattr(self, "loss_normalizer", 100.0)
        random.random(), np.random.rand()
        y = self.net(batch)
        if self.interrupt is not None and len(self.modes) == 2:
            raise self.interrupt
        return {"loss": y.sum() / self.loss_normalizer} if self.training else y


@pytest.mark.parametrize("normalizer", [None, 3.5])
def test_side_effects_are_undone(normalizer: float | None) -> None:
    """RetinaNet's loss_normalizer moves in every training forward (and starts to exist there)."""
    model: Any = Stateful()
    if normalizer is not None:
        model.loss_normalizer = normalizer
    before = Snapshot(model)
    estimate_population_statistics(model, images(2, 3), 2)
    before.assert_unchanged(buffers=False)
    assert model.seen == 0 and (model.scratch == 0).all() and not hasattr(model, "late")
    assert hasattr(model, "loss_normalizer") == (normalizer is not None)
    assert model.modes == [(True, True, True)] * 2


def labelled_batch(*, labels: bool) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = [{"image": x} for x in torch.randn(3, 1, 3, 6, 6)]
    return [{**sample, "instances": object()} for sample in samples] if labels else samples


@pytest.mark.parametrize(
    ("labels", "labelled", "training"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True)],
)
def test_without_labels_only_the_layers_run_in_training_mode(
    labels: bool, labelled: bool | None, training: bool
) -> None:
    model: Any = Stateful()
    model.net[2].eval()
    batches = [labelled_batch(labels=labels) for _ in range(2)]
    before = Snapshot(model)
    report = estimate_population_statistics(model, batches, 2, labelled=labelled)
    assert model.modes == [(training, training, True)] * 2
    assert report.labelled == training and report.frozen == ("net.2",)
    before.assert_unchanged(buffers=False)
    assert not (model.net[6].running_mean == 0).all()


def test_forwards_draw_from_a_seed_of_their_own() -> None:
    batches = images(2, 3)
    states = []
    for outer in (1, 2):
        model = small_net()
        torch.manual_seed(outer)
        before = Snapshot(model)
        estimate_population_statistics(model, batches, 2, seed=7)
        before.assert_unchanged(buffers=False)
        states.append(dict(model.state_dict()))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    torch.manual_seed(1)
    model = small_net()
    estimate_population_statistics(model, batches, 2, seed=8)
    assert not torch.equal(model[6].running_mean, states[0]["6.running_mean"])


class Shuffling(nn.Sequential):
    """A module that asks for the iteration, see rethinking_bn.randomness."""

    told: list[tuple[int, int]]

    def set_iteration(self, run_seed: int, iteration: int) -> None:
        self.told.append((run_seed, iteration))


def test_modules_that_ask_are_told_the_iteration() -> None:
    model = Shuffling(nn.BatchNorm2d(3))
    model.told = []
    estimate_population_statistics(model, images(2, 3), 2)
    assert model.told == []
    estimate_population_statistics(model, images(2, 3), 2, seed=5)
    assert model.told == [(5, 0), (5, 1)]


def test_nothing_reaches_the_event_storage() -> None:
    events = pytest.importorskip("detectron2.utils.events")
    model: Any = Stateful()
    model.net[0].register_forward_hook(
        lambda *_: events.get_event_storage().put_scalar("loss", 1.0)
    )
    with events.EventStorage() as storage:
        estimate_population_statistics(model, images(2, 3), 2)
    assert storage.latest() == {}
    estimate_population_statistics(model, images(2, 3), 2)  # and none is needed outside
    assert not events.has_event_storage()


# --- failures -------------------------------------------------------------------------------------


def raising_loader(error: BaseException) -> Iterator[Tensor]:
    yield images(2)[0]
    raise error


@pytest.mark.parametrize(
    ("number", "autocast", "said"),
    [
        *((number, None, f"num_batches .* got {number!r}") for number in (0, -3, 2.5, True, "3")),
        (1, torch.autocast("cpu", dtype=torch.bfloat16), "a function that makes a context"),
    ],
)
def test_arguments_are_checked(number: Any, autocast: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        estimate_population_statistics(small_net(), images(2), number, autocast=autocast)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    ("loader", "raised", "said"),
    [
        (images(2, 3), ValueError, "rank 0: the loader ended after 2 of 5 batches"),
        (OSError("no such image"), RuntimeError, "after 1 of 5 batches: OSError: no such"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (3, RuntimeError, "after 0 of 5 batches: TypeError"),
    ],
)
def test_a_failing_loader_leaves_the_model_as_it_was(
    loader: Any, raised: type[BaseException], said: str | None, labelled: bool
) -> None:
    model: Any = Stateful()
    before = Snapshot(model)
    batches = raising_loader(loader) if isinstance(loader, BaseException) else loader
    with pytest.raises(raised, match=said) as caught:
        estimate_population_statistics(model, batches, 5, labelled=labelled)
    before.assert_unchanged()
    assert caught.value.__cause__ is loader or not isinstance(loader, OSError)


@pytest.mark.parametrize("error", [KeyError("gt_boxes"), KeyboardInterrupt()])
@pytest.mark.parametrize("labelled", [True, False])
def test_an_interrupted_forward_leaves_the_model_as_it_was(
    error: BaseException, labelled: bool
) -> None:
    model: Any = Stateful()
    model.interrupt = error
    before = Snapshot(model)
    with pytest.raises(type(error)):
        estimate_population_statistics(model, images(2, 3), 2, labelled=labelled)
    before.assert_unchanged()
    # and the next run is as if nothing had been
    model.interrupt, clean = None, Stateful()
    for each in (model, clean):
        estimate_population_statistics(each, images(2, 3), 2, seed=0)
    torch.testing.assert_close(dict(model.state_dict()), dict(clean.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_raise_and_name_the_layer(bad: float) -> None:
    model, batches = small_net(), images(2, 3, 2)
    batches[1][0, 1, 0, 0] = bad
    before = Snapshot(model)
    with pytest.raises(FloatingPointError, match="^0: 1 of 3 channels saw a value that is not fin"):
        estimate_population_statistics(model, batches, 3)
    before.assert_unchanged()
    norm: Any = MultiDomainBatchNorm2d(3, 2, population_stats="domain_specific")
    with pytest.raises(FloatingPointError, match=r"^norm\[1\]"):
        estimate_population_statistics(
            nn.ModuleDict({"norm": norm}), [batches[:2]], 1, forward=lambda m, b: m["norm"](b)
        )
    assert all((state.running_var == 1).all() for state in norm.children())


def test_an_error_while_writing_brings_the_first_layers_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = nn.Sequential(nn.BatchNorm2d(3), SyncBatchNorm2d(3))

    def interrupted(self: Any, moments: Any) -> None:
        self.running_mean.fill_(9.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(SyncBatchNorm2d, "write_population", interrupted)
    before = Snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        estimate_population_statistics(model, images(2), 1)
    before.assert_unchanged()
