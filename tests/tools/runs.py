"""Start tools/train_net.py as people do, and see which of its processes are left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from tests.engine.tiny import tiny_config, write_data

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools" / "train_net.py")
DATA = "coco_2017_val_100"  # registered by detectron2 wherever DETECTRON2_DATASETS points


def write_run(folder: Path, **overrides: Any) -> Path:
    """Write data and ``run.yaml``, for a tiny RetinaNet; return its OUTPUT_DIR."""
    images, annotations = folder / "coco" / "val2017", folder / "coco" / "annotations"
    images.mkdir(parents=True)
    annotations.mkdir()
    categories = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    write_data(images, categories=categories)
    (images / "tiny.json").rename(annotations / "instances_val2017_100.json")
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
    """A run whose processes are known by a variable that only they have."""

    folder: Path
    launcher: subprocess.Popen[Any]
    mark: str

    def processes(self) -> dict[int, str]:
        """Return process id -> command line of every process of the run that is alive."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if self.mark.encode() in (entry / "environ").read_bytes():
                        command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                        found[int(entry.name)] = command.decode()
                except OSError:  # it ended, or is about to
                    continue
        return found

    def ranks(self) -> list[int]:
        """Return the process ids of the spawned ranks."""
        parent = str(self.launcher.pid)
        return [
            pid
            for pid, command in self.processes().items()
            if "spawn_main" in command and _parent(pid) == parent
        ]

    def wait_for(self, text: str, seconds: float = 240) -> None:
        """Wait until the run's log contains a text."""
        deadline = time.monotonic() + seconds
        while text not in self.log():
            assert self.launcher.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def wait_until_gone(self, seconds: float) -> dict[int, str]:
        """Wait until no process is left, but so long at most; return those that are left."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            self.launcher.poll()  # reaps it
            time.sleep(0.2)
        return left

    def log(self) -> str:
        return (self.folder / "output.txt").read_text()


def _parent(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        return ""


@contextmanager
def started(
    folder: Path, *argv: str, prefix: tuple[str, ...] = (), **options: Any
) -> Iterator[Run]:
    """Start the tool; whatever is left of it at the end is killed."""
    mark = f"TEST_RUN={uuid.uuid4().hex}"
    name, value = mark.split("=")
    with (folder / "output.txt").open("wb") as output:
        launcher = subprocess.Popen(
            [*prefix, sys.executable, TOOL, "--config-file", "run.yaml", *argv],
            cwd=folder,
            env={**environment(folder), name: value},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            **options,
        )
    run = Run(folder, launcher, mark)
    try:
        yield run
    finally:
        for pid in run.processes():
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
        launcher.wait()
