"""The studies with --quick through the command line: what they write, that they go on and stop."""

from __future__ import annotations

import copy
import csv
import importlib
import importlib.util
import json
import math
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rethinking_bn.data import ShapesDataset
from studies import STUDIES, Study, report, table_5
from studies.data import (
    load_digits,
    patterned_indices,
    shuffled_indices,
    varied,
)
from studies.detection import batches, box_ap, make_detector
from studies.network import make_net
from studies.study import Claim, Panel, Part, Point, Series
from studies.training import mini_batch_error, train_to_the_end

pytest.importorskip("sklearn", reason="needs scikit-learn, which is not installed")

ROOT = Path(__file__).parents[2]


def command_line() -> Any:
    """Return tools/run_study.py as a module."""
    spec = importlib.util.spec_from_file_location("run_study", ROOT / "tools" / "run_study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toy(run: Any, name: str = "toy") -> Study:
    """Return a study of two quantities."""
    points = [Point("a", "1", 3.0), Point("b", "2")]
    return Study(
        name=name,
        title="A toy",
        source="Table 0",
        panels=[Panel("title", "x", "y", [Series("line", points)], "Table 0")],
        claims=[Claim("a < b", low="a", high="b")],
        settings={"steps": 2},
        quick={"steps": 1},
        parts=2,
        run=run,
    )


def count_and_yield(ran: list[int], stop_at: int | None = None) -> Any:
    def run(settings: Any, seed: int, device: torch.device) -> Any:
        yield {"a": float(seed)}
        if seed == stop_at:
            raise KeyboardInterrupt
        ran.append(seed)
        yield {"b": 2.0 * seed + settings["steps"]}

    return run


_LONG = (
    *("averaging", "domain-shift", "domains", "ema-momentum", "leakage", "population"),
    *("resolution", "small-batch", "train-test"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in _LONG else []) for n in STUDIES]
)
def test_quick(name: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    state = torch.get_rng_state()
    assert command_line().main([name, "--quick", "--output", str(tmp_path)]) == 0
    assert torch.equal(state, torch.get_rng_state())
    study, folder = STUDIES[name], tmp_path / f"{name}-quick"
    written = json.loads((folder / f"{name}.json").read_text())

    assert written["study"] == name and written["quick"] and written["seeds"] == [0]
    assert written["settings"] == json.loads(json.dumps(dict(study.quick)))
    assert written["environment"]["torch"] == torch.__version__
    assert written["environment"]["scikit-learn"]
    assert list(written["values"]) == study.keys(everything=False)
    for key, (value,) in written["values"].items():
        assert 0 <= value <= 100, key
    if name != "rows":  # a detector of a few steps finds nothing
        assert len({tuple(v) for v in written["values"].values()}) > 3  # not all the same
    for row in written["table"]:
        assert row["mean"] == pytest.approx(written["values"][row["key"]][0])
        assert row["std"] is None  # one seed
    assert written["claims"] == []  # a first look settles nothing
    with (folder / f"{name}.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + len(written["table"])
    # nothing left aside, and no picture of zeros
    expected = {"seed_0.json", f"{name}.json", f"{name}.csv"}
    if any(value for (value,) in written["values"].values()):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        expected.add(f"{name}.png")
    assert {path.name for path in folder.iterdir()} == expected
    printed = capsys.readouterr().out
    assert "mean nothing" in printed and study.source in printed and "holds" not in printed


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_well_formed(name: str) -> None:
    study = STUDIES[name]
    assert study.name == name and study.keys() and study.claims
    for claim in study.claims:
        assert {claim.low, claim.high} <= set(study.keys())
    assert set(study.quick) == set(study.settings)
    assert study.run.__module__ is not None
    module = importlib.import_module(study.run.__module__)
    assert module.__file__ and len(Path(module.__file__).read_text().splitlines()) < 150


def test_finished_seeds_are_not_run_again(tmp_path: Path, monkeypatch: Any) -> None:
    ran: list[int] = []
    monkeypatch.setitem(STUDIES, "toy", toy(count_and_yield(ran)))
    arguments = ["toy", "--output", str(tmp_path), "--seeds"]
    assert command_line().main([*arguments, "2"]) == 0 and ran == [0, 1]
    assert command_line().main([*arguments, "3"]) == 0 and ran == [0, 1, 2]
    written = json.loads((tmp_path / "toy" / "toy.json").read_text())
    assert written["values"] == {"a": [0.0, 1.0, 2.0], "b": [2.0, 4.0, 6.0]}
    assert written["table"][1]["std"] == pytest.approx(2.0)
    assert written["claims"][0]["holds"] == "yes"  # differences 2, 3, 4
    # a seed that broke off while being written, and one of other settings, are run again
    (tmp_path / "toy" / "seed_1.json").write_text("{")
    assert command_line().main([*arguments, "3"]) == 0 and ran == [0, 1, 2, 1]
    monkeypatch.setitem(STUDIES, "toy", replace(STUDIES["toy"], settings={"steps": 3}))
    assert command_line().main([*arguments, "1"]) == 0 and ran == [0, 1, 2, 1, 0]


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    ran: list[int] = []
    monkeypatch.setitem(STUDIES, "toy", toy(count_and_yield(ran, stop_at=1)))
    arguments = ["toy", "--output", str(tmp_path), "--seeds", "3"]
    assert command_line().main(arguments) == 130 and ran == [0]
    assert "finished seeds are kept" in capsys.readouterr().err
    assert json.loads((tmp_path / "toy" / "toy.json").read_text())["seeds"] == [0]
    monkeypatch.setitem(STUDIES, "toy", toy(count_and_yield(ran)))
    assert command_line().main(arguments) == 0 and ran == [0, 1, 2]


def test_an_interrupt_keeps_parts_and_the_rest_waits_for_all(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    ran: list[str] = []

    def study(stop: bool) -> Study:
        def values(key: str) -> Any:
            if stop and key == "b":
                raise KeyboardInterrupt
            ran.append(key)
            yield {key: 1.0}

        def run(settings: Any, seed: int, device: torch.device, tick: Any) -> Any:
            for key in "abc":
                yield Part([key], partial(values, key))
                tick()

        points = [Point(key, key) for key in "abc"]
        panels = [Panel("title", "x", "y", [Series("line", points)])]
        return replace(toy(run), panels=panels, more=["c"], ticks=lambda settings: (2, 1))

    arguments = ["toy", "--output", str(tmp_path), "--seeds", "1"]
    monkeypatch.setitem(STUDIES, "toy", study(stop=True))
    assert command_line().main(arguments) == 130 and ran == ["a"]
    assert "parts that stand alone are kept" in capsys.readouterr().err
    monkeypatch.setitem(STUDIES, "toy", study(stop=False))
    assert command_line().main(arguments) == 0 and ran == ["a", "b"]
    assert command_line().main([*arguments, "--all"]) == 0 and ran == ["a", "b", "c"]
    written = json.loads((tmp_path / "toy" / "toy.json").read_text())
    assert written["values"] == {"a": [1.0], "b": [1.0], "c": [1.0]}
    assert written["claims"][0]["holds"] == "one seed"


def three_parts(settings: Any, seed: int, device: torch.device, tick: Any) -> Any:
    def values(key: str) -> Any:
        tick(2)
        if key == settings.get("fails"):
            raise OSError(f"no {key}")
        if key == settings.get("dies"):
            os.kill(os.getpid(), signal.SIGKILL)
        yield {key: float(os.getpid())}
        yield {key + key: float(torch.get_num_threads())}
        yield {f"{key}d": float(torch.rand(()))}

    yield {"first": 1.0}
    for key in "abc":
        yield Part([key, key + key, f"{key}d"], partial(values, key))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, ""), ({"fails": "b"}, "OSError: no b"), ({"dies": "c"}, "ended before its work")],
)
def test_parts_run_side_by_side(
    settings: Any, message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    keys = ["first", "a", "b", "c", "aa", "bb", "cc", "ad", "bd", "cd"]
    panels = [Panel("title", "x", "y", [Series("line", [Point(key, key) for key in keys])])]
    study = replace(toy(three_parts), panels=panels, settings=settings, ticks=lambda _: (6, 0))
    monkeypatch.setitem(STUDIES, "toy", study)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    arguments = ["toy", "--output", str(tmp_path), "--seeds", "1"]
    if message:
        with pytest.raises(RuntimeError, match=message):
            command_line().main(arguments)
        assert not (tmp_path / "toy" / "toy.json").exists()
        return
    assert command_line().main(arguments) == 0
    values = json.loads((tmp_path / "toy" / "toy.json").read_text())["values"]
    drawn = torch.rand((), generator=torch.Generator().manual_seed(0)).item()
    assert [values[key] for key in ("first", "ad", "bd", "cd")] == [[1.0], *[[drawn]] * 3]
    processes = {values[key][0] for key in "abc"}
    assert len(processes) == 3 and os.getpid() not in processes
    assert all(values[key] == [2.0] for key in ("aa", "bb", "cc"))  # threads of each


def test_an_interrupt_of_the_first_seed_writes_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(STUDIES, "toy", toy(count_and_yield([], stop_at=0)))
    assert command_line().main(["toy", "--output", str(tmp_path)]) == 130
    assert list(tmp_path.rglob("*.json")) == []


def test_a_number_that_is_not_finite_is_an_error(tmp_path: Path, monkeypatch: Any) -> None:
    def run(settings: Any, seed: int, device: torch.device) -> Any:
        yield {"a": math.nan, "b": 1.0}

    monkeypatch.setitem(STUDIES, "toy", toy(run))
    with pytest.raises(FloatingPointError, match="toy, seed 0: a is nan"):
        command_line().main(["toy", "--output", str(tmp_path)])
    assert list(tmp_path.rglob("*.json")) == []


# defect 33: one seed, or a difference within noise, held by its sign
@pytest.mark.parametrize(
    ("low", "high", "similar", "holds"),
    [
        ([1, 2, 3], [4, 5, 7], False, "yes"),
        ([4, 5, 7], [1, 2, 3], False, "no"),
        ([1, 2, 3], [2, 1, 3], False, "within noise"),
        ([1, 1], [1, 1], False, "within noise"),
        ([1], [2], False, "one seed"),
        ([1], [2], True, "one seed"),
        ([1, 2, 3], [2, 1, 3], True, "yes"),
        ([1, 2, 3], [4, 5, 7], True, "no"),
    ],
)
def test_when_a_claim_holds(low: Any, high: Any, similar: bool, holds: str) -> None:
    study = replace(toy(None), claims=[Claim("claim", low="a", high="b", similar=similar)])
    assert report.summarise(study, {"a": low, "b": high})["claims"][0]["holds"] == holds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "invalid choice"),
        (["population", "--seeds", "0"], "at least 1"),
        (["population", "--output", __file__], "is a file"),
    ],
)
def test_bad_arguments_end_at_once(arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        command_line().main(arguments)
    assert message in capsys.readouterr().err


def test_list(capsys: Any) -> None:
    assert command_line().main(["list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == list(STUDIES)


def test_digits_are_split_and_in_range() -> None:
    train, test = load_digits(torch.device("cpu"))
    assert len(train.images) + len(test.images) == 1797
    assert train.images.shape[1:] == (1, 8, 8)
    assert train.images.min() == 0 and train.images.max() == 1
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(10))


def test_conditions_of_the_images() -> None:
    device, conditions = torch.device("cpu"), {"copies": 3, "contrast": 0.1, "brightness": 2.0}
    scans = load_digits(device)
    one, other = (load_digits(device, seed, conditions) for seed in (0, 1))
    assert len(one.train.labels) == 3 * len(scans.train.labels)
    assert torch.equal(one.test.images, other.test.images)
    assert not torch.equal(one.train.images, other.train.images)
    assert torch.equal(one.train.labels[: len(scans.train.labels)], scans.train.labels)
    # each image is scale · scan + offset: its two extremes say which
    low, high = (f(scans.train.images.flatten(1), 1) for f in (torch.amin, torch.amax))
    seen_low, seen_high = (f(one.train.images.flatten(1), 1) for f in (torch.amin, torch.amax))
    scale = (seen_high - seen_low) / (high - low).repeat(3)
    offset = seen_low - scale * low.repeat(3)
    assert 0.0999 < scale.min() < 0.11 and 0.98 < scale.max() < 1.0001
    assert -2 <= offset.min() < -1.9 and 1.9 < offset.max() <= 2
    expected = scans.train.images.repeat(3, 1, 1, 1) * scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(
        one.train.images, expected + offset.view(-1, 1, 1, 1), atol=1e-5, rtol=1e-5
    )
    grainy = varied(scans.test, noise=0.5, seed=3).images - scans.test.images
    assert grainy.std() == pytest.approx(0.5, rel=0.02) and abs(grainy.mean()) < 0.01


def test_micro_batches_add_up_to_the_batch() -> None:
    """GN does not look at the batch, so that its training must not depend on their size."""
    data, weights = load_digits(torch.device("cpu")).train, []
    for micro_batch in (None, 8, 3):
        torch.manual_seed(0)
        net = make_net(lambda channels: torch.nn.GroupNorm(4, channels)).double()
        doubled = data._replace(images=data.images.double())
        indices = shuffled_indices(100, 16, seed=0)
        train_to_the_end(
            net, doubled, indices, steps=3, lr=0.1, micro_batch=micro_batch, label=None
        )
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weights[2], weights[0], rtol=1e-9, atol=1e-9)


def test_mini_batch_error_normalises_groups_by_themselves() -> None:
    torch.manual_seed(0)
    data = load_digits(torch.device("cpu")).test.take(torch.arange(301))
    net = make_net()
    train_to_the_end(net, data, shuffled_indices(301, 32, seed=0), steps=8, lr=0.1, label=None)
    for nbs in (4, 32):
        net.train()
        with torch.no_grad():
            outputs = [copy.deepcopy(net)(x) for x in data.images.split(nbs)]
        wrong = torch.cat(outputs).argmax(1) != data.labels
        assert mini_batch_error(net, data, nbs) == pytest.approx(100 * wrong.float().mean())


def test_batches_of_indices() -> None:
    batches = shuffled_indices(10, 4, seed=1)
    first = torch.cat([next(batches), next(batches)])
    assert len(set(first.tolist())) == 8  # the two that fill no batch are left out
    with pytest.raises(ValueError, match="batch_size must be 1 to 10, got 11"):
        next(shuffled_indices(10, 11, seed=1))
    labels = torch.arange(10).repeat(5)
    (group_1, group_2) = next(patterned_indices(labels, 2, 4, 2, seed=0)).split(8)
    for group in (group_1, group_2):
        assert len(set(group.tolist())) == 8
        assert labels[group].bincount().sort().values.tolist()[-4:] == [2, 2, 2, 2]


def test_box_ap_of_the_truth_is_100(tmp_path: Path) -> None:
    val = ShapesDataset("shapes_val", root=tmp_path, num_images=3)

    class Oracle(torch.nn.Module):
        def __init__(self, off: float) -> None:
            super().__init__()
            self.off = torch.nn.Parameter(torch.tensor(off))
            self.next = 0

        def forward(self, images: Any) -> Any:
            image, target = val[self.next]
            assert torch.equal(images[0], image / 255)
            self.next += 1
            boxes = target["boxes"] + self.off
            return [{"boxes": boxes, "labels": target["labels"], "scores": torch.ones(len(boxes))}]

    assert box_ap(Oracle(0.0), val) == pytest.approx(100.0)
    assert 0 < box_ap(Oracle(2.0), val) < 95
    assert box_ap(Oracle(900.0), val) == 0


def test_flipped_boxes_stay_on_their_objects(tmp_path: Path) -> None:
    data = ShapesDataset("shapes_train", root=tmp_path, num_images=4)
    (images, targets) = next(batches(data, 4, seed=0))
    flipped = 0
    for image, target in zip(images, targets, strict=True):
        index = [int(t["image_id"]) for _, t in data].index(int(target["image_id"]))
        original, truth = data[index]
        box, there = target["boxes"][0].round().int(), truth["boxes"][0].round().int()
        patch = image[:, box[1] : box[3], box[0] : box[2]]
        expected = original[:, there[1] : there[3], there[0] : there[2]] / 255
        if not torch.equal(image, original / 255):
            flipped += 1
            expected = expected.flip(2)
        assert patch.shape == expected.shape
        # boxes are rounded to pixels, so that a flip may be off by one
        assert (patch - expected).abs().mean() < 0.1
    assert 0 < flipped < 4


@pytest.mark.parametrize(
    ("trained", "others"), [("row 1", ["row 2"]), ("row 3", ["row 4"]), ("row 6", ["row 5"])]
)
def test_rows_share_weights_but_not_statistics(trained: str, others: list[str]) -> None:
    torch.manual_seed(0)
    model = make_detector("BN", **table_5._choices(trained))
    for row in others:
        other = make_detector("BN", **table_5._choices(row))
        other.load_state_dict(model.state_dict())
        for name, value in model.named_parameters():
            assert torch.equal(other.get_parameter(name), value)
