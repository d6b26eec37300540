"""Runs are killed, interrupted, hung up and preempted; what is left of them is counted."""

from __future__ import annotations

import os
import pty
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools.runs import TOOL, Run, environment, started, write_run

LONG = 15  # seconds after which no process of an ended run may be left
ENDLESS = {
    "SOLVER__MAX_ITER": 100000,
    "SOLVER__CHECKPOINT_PERIOD": 5,
    "TEST__EVAL_PERIOD": 0,
    "DATALOADER__NUM_WORKERS": 1,
}


def interrupted(run: Run) -> None:
    run.launcher.send_signal(signal.SIGINT)


def killed(run: Run) -> None:
    run.launcher.kill()


def rank_killed(run: Run) -> None:
    os.kill(max(run.ranks()), signal.SIGKILL)


def as_a_background_shell_does() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def as_nohup_does() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "seed"), [(interrupted, 0), (killed, 1), (killed, 2), (rank_killed, 3)]
)
def test_no_process_outlives_its_run(tmp_path: Path, fault: Callable[..., None], seed: int) -> None:
    """Defect 28, started as a script in the background starts it, at random points."""
    write_run(tmp_path, **ENDLESS)
    out = random.Random(seed)
    with started(tmp_path, "--num-gpus", "2", preexec_fn=as_a_background_shell_does) as run:
        if fault is killed and seed % 2:  # while ranks are being started
            while not run.ranks():
                time.sleep(0.05)
        else:
            run.wait_for("Starting training")
        time.sleep(out.uniform(0, 3))
        assert run.ranks()
        fault(run)
        assert run.wait_until_gone(LONG) == {}
        assert run.launcher.wait() == {interrupted: 130, killed: -9, rank_killed: 1}[fault]
        if fault is interrupted:
            assert "train_net.py: interrupted" in run.log() and "Traceback" not in run.log()
        if fault is rank_killed:
            assert "was ended by SIGKILL" in run.log()


@pytest.mark.slow
def test_a_closed_terminal_ends_a_run_and_nohup_keeps_it(tmp_path: Path) -> None:
    """Defect 28."""
    write_run(tmp_path, **ENDLESS)
    for nohup in (False, True):
        master, slave = pty.openpty()

        def in_the_terminal(nohup: bool = nohup, slave: int = slave) -> None:
            if nohup:
                as_nohup_does()
            os.setsid()
            os.close(os.open(os.ttyname(slave), os.O_RDWR))  # becomes the controlling one

        with started(tmp_path, "--num-gpus", "2", preexec_fn=in_the_terminal) as run:
            os.close(slave)
            run.wait_for("Starting training")
            os.close(master)  # SIGHUP to the foreground group
            left = run.wait_until_gone(LONG if not nohup else 3)
            assert bool(left) == nohup


@pytest.mark.slow
def test_a_preempted_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Defect 28: SIGTERM to the launcher, then to one rank; BN without sync: the ranks differ."""
    whole = write_run(
        tmp_path, **{**ENDLESS, "SOLVER__MAX_ITER": 40, "SOLVER__CHECKPOINT_PERIOD": 1000}
    )
    command = ["--num-gpus", "2", "OUTPUT_DIR"]
    with started(tmp_path, *command, str(whole)) as run:
        assert run.launcher.wait() == 0, run.log()
    parts = tmp_path / "parts"
    saved = []
    for seed in (0, 1):
        with started(tmp_path, "--resume", *command, str(parts)) as run:
            run.wait_for("Starting training")
            time.sleep(random.Random(seed).uniform(0, 1))
            os.kill((run.launcher.pid, max(run.ranks()))[seed], signal.SIGTERM)
            assert run.wait_until_gone(30 + 5) == {}
            assert run.launcher.wait() == 143, run.log()
            assert "Traceback" not in run.log()
        saved.append((parts / "last_checkpoint").read_text())
        assert sorted(path.name for path in parts.glob("model_*")) == sorted(saved)
    with started(tmp_path, "--resume", *command, str(parts)) as run:
        assert run.launcher.wait() == 0, run.log()
    assert "model_final.pth" not in saved
    before, after = (torch.load(out / "model_final.pth") for out in (whole, parts))
    assert differences(before, after) == []


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
def test_a_second_sigterm_ends_at_once_and_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    """Defects 28 and 29."""
    out = write_run(tmp_path, **ENDLESS)
    with started(tmp_path, "--num-gpus", "2") as run:
        run.wait_for("Starting training")
        (rank_0, *_) = sorted(run.ranks())
        before = (out / "log.txt").read_bytes()
        second = subprocess.run(
            [sys.executable, TOOL, "--config-file", "run.yaml"],
            cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True,
        )  # fmt: skip
        assert second.returncode == 1 and second.stdout == ""
        (line,) = second.stderr.splitlines()
        assert f"host {os.uname().nodename}, process {rank_0} trains there" in line
        assert str(out) in line and (out / "log.txt").read_bytes().startswith(before)
        os.kill(run.launcher.pid, signal.SIGSTOP)  # so that the two come as two, but both at once
        for rank in run.ranks():
            os.kill(rank, signal.SIGSTOP)
        run.launcher.send_signal(signal.SIGTERM)
        os.kill(run.launcher.pid, signal.SIGCONT)
        time.sleep(1.5)
        assert run.launcher.poll() is None
        run.launcher.send_signal(signal.SIGTERM)
        assert run.wait_until_gone(LONG) == {}
        assert run.launcher.wait() == 143
        assert "second SIGTERM" in run.log()
