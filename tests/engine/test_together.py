"""Accumulation, mixed precision, freezing, averaging and population training in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_weight_average import interrupted_and_not
from tests.engine.tiny import write_data
from tests.helpers import run_distributed

EVERYTHING = {
    "SOLVER__IMS_PER_BATCH": "8",  # two images in each of two passes on two ranks
    "SOLVER__ACCUMULATION_STEPS": "2",
    "SOLVER__AMP__ENABLED": "True",
    "SOLVER__AVERAGE__KIND": "ema",
    "TEST__PRECISE_BN__ENABLED": "True",
    "TEST__EVAL_PERIOD": "3",
    "TEST__PRECISE_BN__NUM_ITER": "1",
}


def on_rank(rank: int, folder: Path, overrides: dict[str, str]) -> tuple[Any, Any]:
    return interrupted_and_not(folder, overrides)


# frozen after the checkpoint that is resumed, and before it
@pytest.mark.parametrize("start", ["4", pytest.param("2", marks=pytest.mark.slow)])
def test_resumed_on_two_processes(tmp_path: Path, start: str) -> None:
    write_data(tmp_path)
    overrides = {**EVERYTHING, "SOLVER__FREEZE_BN__START": start}
    first, second = run_distributed(on_rank, 2, tmp_path, overrides, timeout=280)
    for whole, resumed in (first, second):
        assert whole == resumed
    for key in ("state", "average", "updates"):
        assert first[0][key] == second[0][key], key
    assert first[0]["updates"] == 6 and first[0]["losses"] != second[0]["losses"]
    assert first[0]["state"] != first[0]["average"]
