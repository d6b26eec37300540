"""Accumulation, mixed precision, freezing, averaging and population training in one killed run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_resume import Interruption
from tests.engine.test_weight_average import record, train
from tests.engine.tiny import register_data, tiny_config, write_data
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


class Kill(Interruption):
    """SIGKILL to every rank, which nothing can catch."""

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            os.kill(os.getpid(), signal.SIGKILL)


def on_rank(
    rank: int, folder: Path, start: str, *, resume: bool = False, kill_at: int | None = None
) -> dict[str, Any]:
    overrides = {**EVERYTHING, "SOLVER__FREEZE_BN__START": start}
    cfg = tiny_config(register_data(folder), folder / "out", **overrides)
    kill = None if kill_at is None else Kill(kill_at)
    return record(train(cfg, resume=resume, interruption=kill))


def killed(rank: int, folder: Path, start: str) -> None:
    on_rank(rank, folder, start, kill_at=4)


def resumed(rank: int, folder: Path, start: str) -> dict[str, Any]:
    return on_rank(rank, folder, start, resume=True)


# frozen after the checkpoint that is resumed, and before it
@pytest.mark.slow
@pytest.mark.parametrize("start", ["4", "2"])
def test_killed_and_resumed_on_two_processes(tmp_path: Path, start: str) -> None:
    """Six iterations, and again with all ranks killed in the fifth; checkpoint after 3."""
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        folder.mkdir()
        write_data(folder)
    whole = run_distributed(on_rank, 2, tmp_path / "whole", start, timeout=140)
    with pytest.raises(RuntimeError, match="ended without an answer"):
        run_distributed(killed, 2, tmp_path / "killed", start, timeout=140)
    assert not (tmp_path / "killed" / "out" / "model_final.pth").exists()
    again = run_distributed(resumed, 2, tmp_path / "killed", start, timeout=140)
    for before, after in zip(whole, again, strict=True):
        assert sorted(after["losses"]) == [3, 4, 5]
        assert all(after["losses"][i] == before["losses"][i] for i in (3, 4, 5))
        for key in ("state", "average", "updates"):
            assert before[key] == after[key] == whole[0][key], key
    assert whole[0]["updates"] == 6 and whole[0]["losses"] != whole[1]["losses"]
    assert whole[0]["state"] != whole[0]["average"]
