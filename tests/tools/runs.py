"""Start tools/train_net.py as people do, and see which of its processes are left."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.multiprocessing
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES, _get_builtin_metadata

from tests.engine.tiny import tiny_config, write_data

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools" / "train_net.py")
DATA = "coco_2017_val_100"  # registered by detectron2 wherever DETECTRON2_DATASETS points
JSON, IMAGES = "coco/annotations/instances_val2017_100.json", "coco/val2017"


def write_run(folder: Path, **overrides: Any) -> Path:
    """Write data and ``run.yaml``, for a tiny RetinaNet; return its OUTPUT_DIR."""
    (folder / IMAGES).mkdir(parents=True)
    (folder / JSON).parent.mkdir()
    categories = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    write_data(folder / IMAGES, categories=categories)
    (folder / IMAGES / "tiny.json").rename(folder / JSON)
    overrides = {"MODEL__RETINANET__NUM_CLASSES": 80, **overrides}
    cfg = tiny_config(DATA, folder / "out", **overrides)
    (folder / "run.yaml").write_text(cfg.dump())
    return folder / "out"


def environment(folder: Path) -> dict[str, str]:
    """Return the variables of a run in a folder, without those of a surrounding torchrun."""
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    return kept | {
        "DETECTRON2_DATASETS": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


@dataclass
class Run:
    """A run whose processes are known by the file that they print to."""

    output: Path
    launcher: subprocess.Popen[Any] | BaseProcess

    def processes(self) -> dict[int, str]:
        """Return process id -> command line of every process of the run that is alive."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # it ended, or is about to
                    if os.readlink(entry / "fd" / "2") == str(self.output):
                        command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                        found[int(entry.name)] = command.decode()
        return found

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks, those that are still importing included."""
        found = []
        for pid, command in self.processes().items():
            with contextlib.suppress(OSError):
                leads = os.getpgid(pid) == pid  # its process group
                if _parent(pid) == self.launcher.pid and (leads or "spawn_main" in command):
                    found.append(pid)
        return sorted(found)

    def signal(self, number: int) -> None:
        """Send a signal to the launcher."""
        assert self.launcher.pid is not None
        os.kill(self.launcher.pid, number)

    def status(self, seconds: float | None = None) -> int | None:
        """Wait for the launcher's end; return its exit status, None if it goes on."""
        if isinstance(self.launcher, BaseProcess):
            self.launcher.join(seconds)
            return self.launcher.exitcode
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.launcher.wait(seconds)
        return self.launcher.returncode

    def wait_for(self, text: str, seconds: float = 240) -> None:
        """Wait until the run's log contains a text."""
        deadline = time.monotonic() + seconds
        while text not in self.log():
            assert self.status(0.05) is None, self.log()
            assert time.monotonic() < deadline, self.log()

    def wait_until_gone(self, seconds: float) -> dict[int, str]:
        """Wait until no process is left, but so long at most; return those that are left."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            self.status(0.05)  # reaps it
        return left

    def log(self) -> str:
        return self.output.read_text()


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@contextmanager
def started(folder: Path, *argv: str, ignored: Iterable[int] = ()) -> Iterator[Run]:
    """Start the tool as a shell does, some signals ignored; what is left at the end is killed."""

    def ignore() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    path = folder / f"{uuid.uuid4().hex}.txt"
    with path.open("wb") as output:
        launcher = subprocess.Popen(
            [sys.executable, TOOL, "--config-file", "run.yaml", *argv],
            cwd=folder,
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=ignore,
        )
    with _killed_at_the_end(Run(path, launcher)) as run:
        yield run


@contextmanager
def forked(
    folder: Path, *argv: str, ignored: Iterable[int] = (), terminal: str | None = None
) -> Iterator[Run]:
    """Start the tool as :func:`started`, but in a second: forked from what has imported it.

    ``terminal`` is to control the launcher.
    """
    path = folder / f"{uuid.uuid4().hex}.txt"
    path.touch()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["detectron2.evaluation", "rethinking_bn.engine.launch"])
    arguments = (folder, path, argv, tuple(ignored), terminal)
    launcher = context.Process(target=_run_tool, args=arguments)
    launcher.start()
    with _killed_at_the_end(Run(path, launcher)) as run:
        yield run


def _run_tool(
    folder: Path, path: Path, argv: tuple[str, ...], ignored: tuple[int, ...], terminal: str | None
) -> None:
    """Be the launcher: in a process of its own, that has imported what the tool needs."""
    os.environ.update(environment(folder))
    os.chdir(folder)
    for number in (1, 2):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    if terminal is not None:
        os.setsid()
        os.close(os.open(terminal, os.O_RDWR))  # becomes the controlling one
    # what importing detectron2 does with DETECTRON2_DATASETS
    DatasetCatalog.remove(DATA)
    MetadataCatalog.remove(DATA)
    register_coco_instances(
        DATA, _get_builtin_metadata("coco"), str(folder / JSON), str(folder / IMAGES)
    )
    # which detectron2's launcher calls
    start: Any = torch.multiprocessing.start_processes
    torch.multiprocessing.start_processes = partial(start, start_method="fork")
    sys.argv = [TOOL, "--config-file", "run.yaml", *argv]
    runpy.run_path(TOOL, run_name="__main__")


@contextmanager
def _killed_at_the_end(run: Run) -> Iterator[Run]:
    try:
        yield run
    finally:
        for pid in run.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.status()
