"""Every comparison of the benchmark at toy sizes: what it reports, and that it refuses a fake.

Nothing here looks at how long anything took.
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import (
    COMPARISONS,
    Options,
    ResultsDiffer,
    collectives,
    compare,
    mabn,
    precise_bn,
    shuffle,
)
from benchmarks.comparators.batch_norm import (
    ConcatenatedBatchNorm2d,
    PlainSyncBatchNorm2d,
)
from benchmarks.comparators.mabn import EagerMABN2d
from benchmarks.comparators.shuffle import PaddedShuffle, PaddedState
from benchmarks.equality import require_equal, require_equal_state
from benchmarks.memory import saved_bytes
from benchmarks.processes import alternate_together
from benchmarks.result import Result
from benchmarks.timing import Plan, alternate, ratios, spread
from studies.processes import run_processes

QUICK = Options(quick=True)

# what each comparison must at least have measured: parts of "case | ours | other"
EXPECTED = {
    "diagnosis": [
        "| diagnosis, no output effects | population training",
        "| diagnosis | population training",
    ],
    "dispatch": [
        "five levels | row 1 | concatenate/split",
        "five levels | row 4 | five nn.BatchNorm2d",
        "one tensor | BatchNorm2d | nn.BatchNorm2d",
        "one tensor | MABN2d | nn.BatchNorm2d",
    ],
    "level-norm": [
        "float32 | shared BN | concatenate/split",
        "float32 | shared BN | five nn.BatchNorm2d",
        "float32 | shared BN | five nn.GroupNorm",
        "float32 | domain-specific BN | CycleBatchNormList",
        "saved for backward | domain-specific BN | CycleBatchNormList",
        "float32 channels_last | shared BN | concatenate/split",
        "bfloat16 | shared BN | concatenate/split",
    ],
    "head": [
        "less itself without one | ours, row 1 | detectron2, BN",
        "head without norm | ours, row 1 | detectron2, BN",
        "whole step | ours, no norm | detectron2, no norm",
    ],
    "collectives": ["all_gather per step", "all_reduce per step", "step, 2 processes"],
    "shuffle": ["2 processes", "most sent by a rank"],
    "precise-bn": [
        "estimate_population_statistics | forward without gradients",
        "fvcore.update_bn_stats",
        "RetinaNet head, shared BN",
        "2 processes | one process",
    ],
    "mabn": ["MABN2d | eager formulas", "MABN2d | nn.BatchNorm2d"],
    "averaging": ["AveragedWeights.update | torch's AveragedModel"],
}


@pytest.fixture(autouse=True)
def _same_environment_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    # The tool sets this variable for the processes it starts, unless it is set.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore::FutureWarning")


def load_tool() -> Any:
    """Import tools/benchmark.py from its path: other packages are named tools, too."""
    path = Path(__file__).parents[2] / "tools" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark_tool", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():  # the tool sets filters of its own
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_tool(capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function from a command line to (exit status, stdout, stderr)."""
    tool = load_tool()

    def run(*arguments: str) -> tuple[int, str, str]:
        status = tool.main(list(arguments))
        return status, *capsys.readouterr()

    return run


def _check_measurement(m: dict[str, Any]) -> None:
    for name in ("our_value", "other_value", "ratio"):
        value = m[name]
        if name == "ratio" and value is None:
            continue
        assert set(value) == {"median", "low", "high"}
        assert all(math.isfinite(v) for v in value.values())
        assert value["low"] <= value["median"] <= value["high"]


_LONG = ("diagnosis", "level-norm", "precise-bn")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in _LONG else []) for n in COMPARISONS]
)
def test_the_tool_runs_a_comparison_and_reports_it(name: str, tmp_path: Any, run_tool: Any) -> None:
    if name in ("head", "collectives"):
        pytest.importorskip("detectron2")
    status, out, _ = run_tool(name, "--quick", "--output", str(tmp_path))
    assert status == 0
    report = json.loads((tmp_path / f"benchmark_{name}_cpu.json").read_text())
    assert report["quick"] is True
    environment = report["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert environment["cores"] >= 1 and environment["cpu"]
    (comparison,) = report["comparisons"]
    assert comparison["name"] == name and comparison["seconds"] > 0
    assert comparison["largest_relative_errors"]
    for m in comparison["measurements"]:
        _check_measurement(m)
    for table in comparison["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    kinds = {"json", "md"}
    if any(table["plot"] for table in comparison["tables"]):
        kinds.add("png")
        assert (tmp_path / f"benchmark_{name}_cpu.png").read_bytes().startswith(b"\x89PNG")
    written = {path.name for path in tmp_path.iterdir()}  # nothing is left of writing aside
    assert written == {f"benchmark_{name}_cpu.{kind}" for kind in kinds}
    told = [f"{m['case']} | {m['ours']} | {m['other']}" for m in comparison["measurements"]]
    skipped = " ".join(comparison["notes"])
    for expected in EXPECTED[name]:
        there = any(expected in line for line in told)
        assert there or ("skipped" in skipped and "not installed" in skipped), expected
    for m in comparison["measurements"]:
        assert m["ours"] in out and m["other"] in out
    if name == "collectives":
        _check_collectives(comparison)


def _check_collectives(comparison: dict[str, Any]) -> None:
    """One per layer against one per level and layer, none besides, and the bytes of the formula."""
    values = {
        m["case"]: (m["our_value"]["median"], m["other_value"]["median"])
        for m in comparison["measurements"]
    }
    assert values["all_gather per step"] == values["all_reduce per step"] == (8, 40)
    # 8 layers x 5 levels: a count, 8 means and 8 M2 gathered, 2 x 8 sums reduced, of 4 bytes
    kib = 8 * 5 * ((1 + 2 * 8) + 2 * 8) * 4 / 1024
    assert values["sent per rank and step"] == pytest.approx((kib, kib))
    assert "other collectives of ours: none" in comparison["notes"]


def _off(x: Any) -> Any:
    return [_off(v) for v in x] if isinstance(x, list) else x * 1.05


def test_wrong_concatenated_batch_norm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ConcatenatedBatchNorm2d.forward
    monkeypatch.setattr(ConcatenatedBatchNorm2d, "forward", lambda *a: _off(right(*a)))
    with pytest.raises(ResultsDiffer, match="shared BN = concatenate/split, outputs"):
        compare("level-norm", QUICK)


def test_a_refused_comparison_ends_the_tool_with_one_line(
    monkeypatch: pytest.MonkeyPatch, run_tool: Any, tmp_path: Any
) -> None:
    right = EagerMABN2d.average
    monkeypatch.setattr(EagerMABN2d, "average", lambda *a: right(*a) * 1.01)
    status, out, err = run_tool("mabn", "--quick", "--output", str(tmp_path))
    assert status == 1
    assert err.startswith("mabn: the sides differ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_only_gradients_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    right = EagerMABN2d.average

    def average(self: EagerMABN2d, window: list[Tensor], value: Tensor) -> Tensor:
        changed = 1.01 if window is self.backward_window else 1.0
        return right(self, window, value) * changed

    monkeypatch.setattr(EagerMABN2d, "average", average)
    with pytest.raises(ResultsDiffer, match="gradients"):
        mabn.run(QUICK)


def test_wrong_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = pytest.importorskip("detectron2.layers")
    right = layers.CycleBatchNormList.forward
    monkeypatch.setattr(layers.CycleBatchNormList, "forward", lambda *a: _off(right(*a)))
    with pytest.raises(ResultsDiffer, match="ours, row 4 = detectron2, BN"):
        compare("head", QUICK)


def test_wrong_population_statistics_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precise_bn, "estimate_population_statistics", lambda *a, **k: None)
    with pytest.raises(ResultsDiffer, match="resnet18"):
        compare("precise-bn", QUICK)


class UncorrectedSync(PlainSyncBatchNorm2d):
    """Forgets what the other ranks hold."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.BatchNorm2d.forward(self, input)


def test_wrong_synchronised_norm_is_refused() -> None:
    pytest.importorskip("detectron2")
    with pytest.raises(ResultsDiffer, match="rank [01]: one collective.*outputs"):
        collectives.run(QUICK, per_level=UncorrectedSync)


class ForgetfulShuffle(PaddedShuffle):
    """Leaves the rows in shuffled order."""

    def unshuffle(self, rows: Tensor, state: PaddedState) -> Tensor:
        return super().unshuffle(rows, state).flip(0)


def test_wrong_shuffle_is_refused() -> None:
    with pytest.raises(ResultsDiffer, match="unshuffled rows"):
        shuffle.run(QUICK, other=ForgetfulShuffle)


def test_require_equal_names_what_differs() -> None:
    a, b = torch.ones(3), torch.ones(3)
    assert require_equal("x", [a], [b], 0.0) == 0
    with pytest.raises(ResultsDiffer, match="x: shapes"):
        require_equal("x", [a], [torch.ones(2)], 1.0)
    with pytest.raises(ResultsDiffer, match="x: tensor 1 of 2"):
        require_equal("x", [a, a], [b, b * 1.1], 0.01)
    with pytest.raises(ResultsDiffer, match="nan"):
        require_equal("x", [a * math.nan], [b], 1.0)
    with pytest.raises(ResultsDiffer, match="only one side has"):
        require_equal_state("s", {"mean": a}, {"var": a}, 1.0)
    with pytest.raises(ResultsDiffer, match="s, mean"):
        require_equal_state("s", {"mean": a}, {"mean": a * 2}, 0.1)


def test_saved_bytes_counts_shared_memory_once() -> None:
    x, w = torch.ones(10, requires_grad=True), torch.ones(10, requires_grad=True)
    assert saved_bytes(lambda: x * w) == 80
    assert saved_bytes(lambda: x * w, exclude=[w]) == 40
    assert saved_bytes(lambda: (x * w) * w, exclude=[w]) == 80
    assert saved_bytes(lambda: x[:5].exp()) == 20


def test_alternate_gives_every_side_one_time_a_round() -> None:
    calls: list[str] = []
    plan = Plan(seconds=0.0, min_rounds=4, max_rounds=4, warmup=1, min_sample=0.0)
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = alternate(sides, torch.device("cpu"), plan)
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4}
    # warm-up and calibration, then each round starts with another side
    assert "".join(calls) == "ab" + "ab" + "ab" + "ba" + "ab" + "ba"


def test_ratios() -> None:
    assert spread([3.0]) == (3, 3, 3)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3, 2, 4)
    assert ratios([1.0, 4.0], [2.0, 2.0]) == [0.5, 2.0]
    result = Result("x")
    result.measure("c", ("ours", [1.0, 1.0]), ("other", [2.0, 2.0]))
    result.measure("c", ("ours", [1.0]), ("other", [1.5]), paired=[])
    assert [m.ratio for m in result.measurements] == [(0.5, 0.5, 0.5), None]


def test_unknown_comparison_and_wrong_command_lines(
    capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    with pytest.raises(ValueError, match="'speed'; there are level-norm"):
        compare("speed", QUICK)
    tool = load_tool()
    (tmp_path / "file").write_text("")
    wrong = [["speed"], ["mabn", "--output", str(tmp_path / "file")]]
    if not torch.cuda.is_available():
        wrong.append(["mabn", "--device", "cuda"])
    for arguments in wrong:
        with pytest.raises(SystemExit) as stopped:
            tool.parse(arguments)
        assert stopped.value.code == 2
    assert "no usable GPU" in capsys.readouterr().err or torch.cuda.is_available()


def _idle_on_one_rank(device: torch.device) -> int:
    """Take turns at a step that only rank 0 has work in; return how often it ran."""
    ran = [0]

    def work() -> None:
        ran[0] += 1
        time.sleep(0.01 if torch.distributed.get_rank() == 0 else 0.0)

    alternate_together({"work": work}, device, Plan(seconds=0.0, min_rounds=3, max_rounds=3))
    return ran[0]


def test_an_idle_rank_does_not_choose_how_often_a_step_runs() -> None:
    assert max(run_processes(_idle_on_one_rank, 2)) < 20


def _fails_on_one_rank(device: torch.device) -> None:
    if torch.distributed.get_rank() == 1:
        raise KeyError("lost")
    torch.distributed.barrier()


def test_a_failing_rank_fails_all() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1:.*KeyError: 'lost'"):
        run_processes(_fails_on_one_rank, 2)
