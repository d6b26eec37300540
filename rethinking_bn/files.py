"""Files and folders that are either there in full or not at all, and folders that can be written.

What is written aside has a unique hidden name beside its place, so that processes that write the
same file do not meet, and a process that is killed leaves nothing under the final name. What such
a process leaves under the hidden one is removed an hour later, by the next to write there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_ABANDONED = 3600  # seconds without a change after which what was written aside has no writer
_SUFFIX = "partial"


def replace(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file or a folder aside, then give it its name in one step.

    Args:
        path: of the file, which may be there already, or of the folder, which must not. The folder
            above is made.
        write: is given the path to write to.

    Raises:
        OSError: if it cannot be written, or a folder cannot be renamed to ``path``. On this and any
            other exception there is neither the new file nor a part of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.{_SUFFIX}")
    try:
        write(aside)
        if aside.is_file():
            with open(aside, "rb+") as file:
                os.fsync(file.fileno())  # the name must not become visible before the contents
        os.replace(aside, path)
    finally:
        _remove(aside)
    remove_abandoned(path.parent.glob(f".{path.name}.*"))


def write_json(path: Path, content: Any) -> None:
    """Write ``content``; a number that is not finite is a ValueError."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    replace(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Return what a file holds, None if there is no such file or it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def probe_folder(folder: str | os.PathLike[str], name: str) -> None:
    """Make a folder, if need be, and see that files can be written there.

    To be called before the work whose results are to go there.

    Args:
        folder: its leftovers of killed processes are removed, when they are old.
        name: the key or option that names the folder, for the message.

    Raises:
        OSError: naming ``name`` and the folder and saying why, in one line.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{uuid.uuid4().hex}.{_SUFFIX}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        in_the_way = [place for place in (folder, *folder.parents) if place.is_file()]
        why = f"{in_the_way[0]} is a file" if in_the_way else error.strerror or str(error)
        raise type(error)(
            f"{name} {str(folder)!r} cannot be written to ({why}): name another folder"
        ) from error
    remove_abandoned(folder.glob(f".*.{_SUFFIX}"))


def remove_abandoned(hidden: Iterable[Path]) -> None:
    """Remove, of what was written aside, that whose writer must be dead."""
    for old in hidden:
        with contextlib.suppress(OSError):  # its writer may be removing it right now
            parts = (list(old.iterdir()) if old.is_dir() else []) or [old]
            if all(time.time() - part.stat().st_mtime > _ABANDONED for part in parts):
                _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
