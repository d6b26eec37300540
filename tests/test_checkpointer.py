"""Checkpoint files are complete or absent, and saving one need not move last_checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rethinking_bn.engine import Checkpointer


class Unsaveable:
    """Fails when torch.save is half way through the file."""

    def __reduce__(self) -> Any:
        raise RuntimeError("disk full")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_saved_checkpoint_loads_and_is_the_last_one(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    Checkpointer(model, str(tmp_path)).save("model_0000004", iteration=4)
    other = nn.Linear(2, 3)
    rest = Checkpointer(other, str(tmp_path)).resume_or_load("", resume=True)
    assert rest["iteration"] == 4
    assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)
    assert sorted(contents(tmp_path)) == ["last_checkpoint", "model_0000004.pth"]


def test_an_untagged_checkpoint_leaves_last_checkpoint_alone(tmp_path: Path) -> None:
    """Defect 17."""
    checkpointer = Checkpointer(nn.Linear(2, 3), str(tmp_path))
    checkpointer.save_untagged("model_population")
    assert sorted(contents(tmp_path)) == ["model_population.pth"]
    checkpointer.save("model_final")
    checkpointer.save_untagged("model_population")
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    checkpointer = Checkpointer(nn.Linear(2, 3), str(tmp_path))
    checkpointer.save("model_final", iteration=1)
    before = contents(tmp_path)
    with pytest.raises(RuntimeError, match="disk full"):
        checkpointer.save("model_final", payload=[torch.zeros(1000), Unsaveable()])
    with pytest.raises(RuntimeError, match="disk full"):
        checkpointer.save("model_0000009", payload=[torch.zeros(1000), Unsaveable()])
    assert contents(tmp_path) == before


def test_the_final_name_appears_only_when_the_file_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = Checkpointer(nn.Linear(2, 3), str(tmp_path))
    seen = []
    save = torch.save

    def watch(obj: Any, file: Any) -> None:
        save(obj, file)
        seen.extend(path.name for path in tmp_path.iterdir())

    monkeypatch.setattr(torch, "save", watch)
    checkpointer.save("model_final")
    assert seen and not any(name.endswith(".pth") or name == "last_checkpoint" for name in seen)


def test_a_name_with_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sub/model"):
        Checkpointer(nn.Linear(2, 3), str(tmp_path)).save("sub/model")


def test_ranks_other_than_the_first_write_nothing(tmp_path: Path) -> None:
    checkpointer = Checkpointer(nn.Linear(2, 3), str(tmp_path), save_to_disk=False)
    checkpointer.save("model_final")
    checkpointer.save_untagged("model_population")
    assert contents(tmp_path) == {}
