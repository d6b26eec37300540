"""The benchmark tool at toy sizes: every comparison runs, and refuses a fake.

Nothing here looks at how long anything took.
"""

from __future__ import annotations

import importlib
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import COMPARISONS, levels, mabn, precise_bn

_LONG = ("diagnosis", "head", "level-norm", "precise-bn")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    # The tool sets this variable for the processes it starts, unless it is set.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore::FutureWarning")
    with warnings.catch_warnings():  # and filters of its own
        return importlib.import_module("benchmark")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in _LONG else []) for n in COMPARISONS]
)
def test_the_tool_runs_a_comparison_and_reports_it(
    name: str, tmp_path: Any, tool: Any, capsys: Any
) -> None:
    if name in ("head", "collectives"):
        pytest.importorskip("detectron2")
    assert tool.main([name, "--quick", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / f"benchmark_{name}_cpu.json").read_text())
    assert report["quick"] is True and report["environment"]["torch"] == torch.__version__
    (comparison,) = report["comparisons"]
    assert comparison["name"] == name and comparison["checks"]
    out = capsys.readouterr().out
    for m in comparison["measurements"]:
        for value in (m["our_value"], m["other_value"], m["ratio"] or [1, 1, 1]):
            median, low, high = value
            assert math.isfinite(high) and low <= median <= high
        assert m["ours"] in out and m["other"] in out
    if name == "collectives":  # one per layer against one per level and layer, and none besides
        counts = [m for m in comparison["measurements"] if not m["unit"]]
        assert {m["case"].split()[0] for m in counts} == {"all_gather", "all_reduce"}
        assert all((m["our_value"][0], m["other_value"][0]) == (8, 40) for m in counts)


def _off(x: Any) -> Any:
    return [_off(v) for v in x] if isinstance(x, list) else x * 1.05


def test_wrong_results_end_the_tool_with_one_line(
    monkeypatch: pytest.MonkeyPatch, tool: Any, tmp_path: Path, capsys: Any
) -> None:
    right, average = levels.ConcatenatedBatchNorm2d.forward, mabn.EagerMABN2d.average

    def wrong(self: Any, window: list[Tensor], value: Tensor) -> Tensor:
        return average(self, window, value) * (1.01 if window is self.backward_window else 1.0)

    monkeypatch.setattr(levels.ConcatenatedBatchNorm2d, "forward", lambda *a: _off(right(*a)))
    monkeypatch.setattr(mabn.EagerMABN2d, "average", wrong)  # only gradients differ
    monkeypatch.setattr(precise_bn, "estimate_population_statistics", lambda *a, **k: None)
    for name, said in (
        ("level-norm", "row 1 = concatenate/split, outputs"),
        ("mabn", "gradients"),
        ("precise-bn", "resnet18"),
    ):
        assert tool.main([name, "--quick", "--output", str(tmp_path)]) == 1
        *_, line = capsys.readouterr().err.splitlines()  # after what the compiler says
        assert line.startswith(f"{name}: the sides differ") and said in line
    assert not list(tmp_path.iterdir())


def test_wrong_command_lines(tool: Any, capsys: Any, tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    for arguments, said in (
        (["speed"], "'speed'"),
        (["mabn", "--output", str(tmp_path / "file")], "is a file"),
        (["mabn", "--device", "cuda"], "no usable GPU"),
    ):
        if said == "no usable GPU" and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit) as stopped:
            tool.parse(arguments)
        assert stopped.value.code == 2 and said in capsys.readouterr().err
