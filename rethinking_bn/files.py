"""Files and folders that are either there in full or not at all, and folders that can be written.

What is written aside has a unique hidden name beside its place, so that processes that write the
same file do not meet, and a process that is killed leaves nothing under the final name. What such
a process leaves under the hidden one is removed an hour later, by the next to write there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_ABANDONED = 3600  # seconds without a change after which what was written aside has no writer
_SUFFIX = "partial"
_LOCK = ".lock"
_locked: set[str] = set()  # folders that this process holds


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
    remove_abandoned(path.parent.glob(f".{path.name}.*.{_SUFFIX}"))


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


@contextlib.contextmanager
def locked_folder(folder: str | os.PathLike[str], name: str) -> Iterator[None]:
    """Hold a folder for this process alone, or refuse.

    The lock dies with the process, however that ends, and forked processes do not inherit it
    (fcntl's). The process may nest locks of one folder. Where the file system knows no locks, there
    is a warning and no lock. The file of the lock stays: removing it could remove another's.

    Args:
        folder: exists.
        name: the key or option that names it, for the message.

    Raises:
        BlockingIOError: naming the host and the process that hold the folder, in one line.
    """
    path = os.path.join(os.path.realpath(folder), _LOCK)
    if path in _locked:  # closing any descriptor of the file would give up the lock
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if _lock(descriptor, folder, name):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"host {socket.gethostname()}, process {os.getpid()}".encode())
            _locked.add(path)
        yield
    finally:
        _locked.discard(path)
        os.close(descriptor)


def _lock(
    descriptor: int, folder: str | os.PathLike[str], name: str, kind: int = fcntl.LOCK_EX
) -> bool:
    """Return whether the file is locked now; False where there are no locks."""
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = os.read(descriptor, 1000).decode(errors="replace") or "another process"
        raise BlockingIOError(
            f"{name} {str(folder)!r} is in use: {holder} trains there; wait for its end, or name "
            "another folder"
        ) from error
    except OSError as error:
        logger.warning(
            "%s %s: the file system knows no locks (%s); nothing prevents a second run there",
            name,
            folder,
            error.strerror,
        )
        return False
    return True


def check_unlocked(folder: str | os.PathLike[str], name: str) -> None:
    """Raise as :func:`locked_folder` does, if another process holds the folder; write nothing."""
    path = os.path.join(os.path.realpath(folder), _LOCK)
    if path in _locked or not os.path.isfile(path):
        return
    with contextlib.suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:  # shared: ranks that ask at the same time do not take each other for a run
            _lock(descriptor, folder, name, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)


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
