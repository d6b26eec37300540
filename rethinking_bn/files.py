"""Files that are there in full or not at all, and folders that can be written to.

A file is written under a hidden name beside its place, then renamed. So processes that write the
same file do not meet. A killed process leaves hidden files, which the next one that writes there
removes when they are an hour old.
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

_ABANDONED = 3600  # seconds without a change after which a hidden file has no writer any more
_SUFFIX = "partial"
_locked: set[str] = set()  # folders that this process holds


def replace(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file or a folder at a hidden path, then rename it in one step.

    The folder above ``path`` is made. A file may exist already, a folder must not.

    Raises:
        OSError: if it cannot be written or renamed. On any exception nothing new is left.
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
    _remove_abandoned(path.parent.glob(f".{path.name}.*.{_SUFFIX}"))


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
    """Make a folder, if need be, and try to write there: before the work that it is for.

    Raises:
        OSError: with ``name``, the key or option that names the folder, and the reason.
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
    _remove_abandoned(folder.glob(f".*.{_SUFFIX}"))


@contextlib.contextmanager
def locked_folder(
    folder: str | os.PathLike[str], name: str, kind: int = fcntl.LOCK_EX
) -> Iterator[None]:
    """Hold a folder for this process alone, or refuse; a process may nest locks of one folder.

    The lock ends with the process, and forked processes do not inherit it. A file system without
    locks gets a warning. The file of the lock stays: removing it could remove another's.

    Raises:
        BlockingIOError: with ``name``, the key or option that names the folder, and its holder.
    """
    path, said = os.path.join(os.path.realpath(folder), ".lock"), f"{name} {str(folder)!r}"
    if path in _locked:  # closing any descriptor of the file would give up the lock
        yield
        return
    alone = kind == fcntl.LOCK_EX
    with open(path, "a+" if alone else "r", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.lockf(file, kind | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise BlockingIOError(
                f"{said} is in use: {file.read(1000) or 'another process'} trains there; wait for "
                "its end, or name another folder"
            ) from error
        except OSError as error:
            logger.warning("%s can have two runs: no locks there (%s)", said, error.strerror)
        else:
            if alone:
                file.truncate(0)
                file.write(f"host {socket.gethostname()}, process {os.getpid()}")
                file.flush()
                _locked.add(path)
        try:
            yield
        finally:
            _locked.discard(path)


def check_unlocked(folder: str | os.PathLike[str], name: str) -> None:
    """Raise as :func:`locked_folder` does if another process holds the folder; write nothing."""
    # shared: ranks that ask at the same time do not take each other for a run
    shared = locked_folder(folder, name, fcntl.LOCK_SH)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError), shared:
        pass


def _remove_abandoned(hidden: Iterable[Path]) -> None:
    """Remove hidden files and folders that nobody has changed for an hour."""
    for old in hidden:
        with contextlib.suppress(OSError):  # its writer may be removing it right now
            parts = [old, *(old.iterdir() if old.is_dir() else ())]
            if all(time.time() - part.stat().st_mtime > _ABANDONED for part in parts):
                _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
