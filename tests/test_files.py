"""Files are whole or absent, whoever writes them at the same time; folders are probed."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rethinking_bn import files


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Defect 29: with one temporary name, the second writer's rename fails."""
    path = tmp_path / "sub" / "file"
    both_have_written = threading.Barrier(2)

    def write(text: str) -> None:
        def write_aside(aside: Path) -> None:
            aside.write_text(text * 1000)
            both_have_written.wait(timeout=20)

        files.replace(path, write_aside)

    with ThreadPoolExecutor() as writers:
        assert list(writers.map(write, "ab")) == [None, None]
    assert path.read_text() in ("a" * 1000, "b" * 1000)
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_everything_as_it_was(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def write(aside: Path) -> None:
        aside.write_text("half")
        raise error

    with pytest.raises(error):
        files.replace(path, write)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["file"]


def test_a_folder_is_renamed_as_a_whole_and_never_over_another(tmp_path: Path) -> None:
    def write(aside: Path) -> None:
        aside.mkdir()
        (aside / "a").touch()

    files.replace(tmp_path / "new", write)
    assert os.listdir(tmp_path / "new") == ["a"]
    with pytest.raises(OSError):
        files.replace(tmp_path / "new", write)
    assert os.listdir(tmp_path) == ["new"]


def test_what_killed_writers_left_is_removed_once_old(tmp_path: Path) -> None:
    old, young = tmp_path / ".model.1.partial", tmp_path / ".model.2.partial"
    for path in (old, young, tmp_path / ".notes"):
        path.touch()
    for path in (old, tmp_path / ".notes"):
        os.utime(path, (time.time() - 7200,) * 2)
    files.probe_folder(tmp_path, "OUTPUT_DIR")
    assert sorted(os.listdir(tmp_path)) == [".model.2.partial", ".notes"]


def test_a_folder_is_made_and_probed(tmp_path: Path) -> None:
    """Defect 30."""
    files.probe_folder(tmp_path / "a" / "b", "OUTPUT_DIR")
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    file = tmp_path / "file"
    for folder, why in ((file, "is a file"), (file / "below", f"{file} is"), ("/proc/none", "")):
        with pytest.raises(OSError, match=f"OUTPUT_DIR '{folder}' .*{why}"):
            files.probe_folder(folder, "OUTPUT_DIR")


def test_numbers_that_json_does_not_know_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert os.listdir(tmp_path) == [] and files.read_json(tmp_path / "a.json") is None
    files.write_json(tmp_path / "a.json", {"a": 1.5})
    assert files.read_json(tmp_path / "a.json") == {"a": 1.5}
