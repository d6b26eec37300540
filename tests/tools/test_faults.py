"""Runs are killed, interrupted, hung up and preempted; what is left of them is counted."""

from __future__ import annotations

import os
import pty
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGSTOP, SIGTERM
from typing import Any

import pytest
import torch

from tests.tools.runs import Run, forked, started, write_run

LONG = 15  # seconds after which no process of an ended run may be left
KEYS = {
    "SOLVER__MAX_ITER": 100000,
    "SOLVER__CHECKPOINT_PERIOD": 5,
    "TEST__EVAL_PERIOD": 0,
    "DATALOADER__NUM_WORKERS": 1,
}
TWO = ("--num-gpus", "2", "OUTPUT_DIR")


def preempted(run: Run) -> None:
    run.signal(SIGTERM)


def killed(run: Run) -> None:
    run.signal(SIGKILL)


def interrupted(run: Run) -> None:
    run.signal(SIGINT)


def rank_killed(run: Run) -> None:
    os.kill(run.ranks()[-1], SIGKILL)


def rank_preempted(run: Run) -> None:
    os.kill(run.ranks()[-1], SIGTERM)


def hung_up(run: Run) -> None:
    os.close(run.terminal)  # type: ignore[attr-defined]


def preempted_twice(run: Run) -> None:
    # stopped, so that the two come as two, but before an iteration ends
    processes = [run.launcher.pid, *run.ranks()]
    for process in processes:
        os.kill(process, SIGSTOP)
    while {said_of(process, "State") for process in processes} != {"T"}:
        time.sleep(0.01)  # a signal that comes before that is handled
    preempted(run)
    run.signal(SIGCONT)
    while not int(said_of(processes[-1], "ShdPnd"), 16) >> (SIGTERM - 1) & 1:  # it is passed on
        assert run.status(0.01) is None
    preempted(run)


def said_of(process: int | None, field: str) -> str:
    """Return what the kernel says of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    return status.split(f"{field}:")[1].split()[0]


# fault -> exit status of the launcher, and what it says
FAULTS: dict[Callable[[Run], None], tuple[int, str]] = {
    preempted: (143, "--resume goes on from there"),
    killed: (-SIGKILL, ""),
    interrupted: (130, "train_net.py: interrupted"),
    rank_preempted: (143, "--resume goes on from there"),
    rank_killed: (1, "was ended by SIGKILL"),
    preempted_twice: (143, "second SIGTERM"),
    hung_up: (-SIGHUP, ""),
}


@pytest.mark.slow
@pytest.mark.ci
def test_runs_end_and_go_on_bit_for_bit(tmp_path: Path) -> None:
    """Defect 28: one run meets every fault, each at a random point, and resumes after each.

    BN without sync: the ranks differ. Its checkpoints are those of a run that nothing happened to,
    but that its terminal was closed (under nohup) and that another was started in its folder.
    """
    write_run(tmp_path, **KEYS)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    point = random.Random(0)
    survivors = {}
    for fault, (status, said) in FAULTS.items():
        # as a background shell starts it
        with in_a_terminal(tmp_path, "--resume", *TWO, str(parts), ignored=[SIGINT]) as run:
            if len(survivors) == len(FAULTS) - 1:  # until there is one to compare
                last = next_checkpoint(parts, run)
            time.sleep(point.uniform(0, 0.5))
            fault(run)
            survivors[fault.__name__] = len(run.wait_until_gone(LONG))
            assert run.status() == status, run.log()
            # a rank that loses another says so in its own words; a data worker's thread, which
            # multiprocessing runs, says so where the rank that it serves dies on the spot
            tracebacks = run.log().split("Traceback (most recent call last)")[1:]
            if fault in (killed, hung_up):
                tracebacks = [text for text in tracebacks if "resource_sharer.py" not in text]
            assert said in run.log() and (not tracebacks or fault is rank_killed), run.log()
    print(f"survivors: {survivors}")
    assert set(survivors.values()) == {0}
    with in_a_terminal(tmp_path, *TWO, str(whole), ignored=[SIGHUP]) as run:
        hung_up(run)
        a_second_run_is_refused(tmp_path, run, whole)
        while not (whole / last).exists():
            assert run.status(0.05) is None, run.log()
        interrupted(run)
        assert run.wait_until_gone(LONG) == {}
    before, after = (torch.load(out / last) for out in (whole, parts))
    assert differences(before, after) == []


def next_checkpoint(folder: Path, run: Run) -> str:
    """Wait for a checkpoint that a run saves because it is due; return its name."""
    before = set(folder.glob("model_*[49].pth"))
    while not (new := set(folder.glob("model_*[49].pth")) - before):
        assert run.status(0.05) is None, run.log()
    return new.pop().name


@contextmanager
def in_a_terminal(folder: Path, *argv: str, ignored: list[int]) -> Iterator[Run]:
    """Start a run whose attribute ``terminal`` closes its terminal when it is closed."""
    master, slave = pty.openpty()
    with forked(folder, *argv, ignored=ignored, terminal=os.ttyname(slave)) as run:
        run.terminal = master  # type: ignore[attr-defined]
        run.wait_for("Starting training")
        os.close(slave)
        yield run


def a_second_run_is_refused(folder: Path, first: Run, out: Path) -> None:
    """Defect 29."""
    before = (out / "log.txt").read_bytes()
    with forked(folder, "OUTPUT_DIR", str(out)) as run:
        assert run.status() == 1
        (line,) = run.log().splitlines()
    assert f"host {os.uname().nodename}, process {first.ranks()[0]} trains there" in line
    assert str(out) in line and (out / "log.txt").read_bytes().startswith(before)


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Name what differs between two checkpoints, bit for bit; times are not compared."""
    if isinstance(a, dict):
        keys = (a.keys() | b.keys()) - {"hooks"}
        return [
            d for k in sorted(keys, key=str) for d in differences(a.get(k), b.get(k), f"{name}.{k}")
        ]
    if isinstance(a, (list, tuple)):
        same = len(a) == len(b)
        pairs = zip(a, b, strict=True)
        return [d for x, y in pairs for d in differences(x, y, f"{name}[]")] if same else [name]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [name]


@pytest.mark.slow
@pytest.mark.ci
def test_no_process_outlives_a_launcher_killed_while_its_ranks_import(tmp_path: Path) -> None:
    """Defect 28, by the tool as a shell starts it."""
    write_run(tmp_path, **KEYS)
    with started(tmp_path, "--num-gpus", "2", ignored=[SIGINT]) as run:
        while len(run.ranks()) < 2:
            assert run.status(0.05) is None, run.log()
        time.sleep(random.Random(1).uniform(0, 1))
        killed(run)
        assert run.wait_until_gone(LONG) == {}
        assert run.status() == -SIGKILL and "Starting training" not in run.log()
