"""Checkpoint files that are either complete or not there, and cannot execute code."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from rethinking_bn.checkpoint import read_file, read_weights
from rethinking_bn.files import replace


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer, writing every file aside and renaming it.

    A run killed while it saves leaves the previous checkpoint and ``last_checkpoint`` as they
    were. A file that is read cannot execute code, and one that cannot be read is a ValueError of
    one line. A checkpoint of another architecture is warned of in one line.

    Attributes:
        misfit: what that line says of the weights loaded last; None for those that fit.
    """

    misfit: str | None = None

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load as detectron2's does; a ValueError names the newest other file that can be read."""
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # which an exception leaves

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            if filename.endswith((".pkl", ".pyth")):
                loaded = _of_other_projects(read_file(filename))
            else:
                loaded = super()._load_file(filename)  # which calls _torch_load
            weights = loaded["model"]
            if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
                raise ValueError(f"{filename} cannot be read as a checkpoint: no weights in it")
            return loaded
        except ValueError as error:
            raise ValueError(f"{error}; {self._remedy(filename)}") from error

    def _torch_load(self, f: str) -> dict[str, Any]:
        return read_file(f)

    def _remedy(self, filename: str) -> str:
        if self.save_dir and os.path.dirname(filename) == self.save_dir:
            others = [os.path.join(self.save_dir, n) for n in later_checkpoints(self.save_dir, 0)]
            for path in sorted(others, key=os.path.getmtime, reverse=True):
                with suppress(OSError, ValueError, MemoryError):
                    read_weights(path)
                    name = os.path.basename(path)
                    return f"the newest that can is {name}: write that name to last_checkpoint"
        return "take another file"

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        given = [key.removeprefix("module.") for key in checkpoint["model"]]
        found = super()._load_model(checkpoint)
        absent = {*found.missing_keys, *(key for key, *_ in found.incorrect_shapes)}
        expected = [key for key, _ in self.model.named_parameters()]
        self.misfit = _misfit(given, expected, [key for key in expected if key not in absent])
        if self.misfit:
            self.logger.warning("%s.", self.misfit)
        return found

    def save(self, name: str, **kwargs: Any) -> None:
        """Save model, checkpointables and ``kwargs`` as the last one; no folder in the name."""
        if self.save_untagged(name, **kwargs):
            self.tag_last_checkpoint(f"{name}.pth")

    def save_untagged(self, name: str, **kwargs: Any) -> bool:
        """Save for no training to resume from; return whether this rank writes."""
        if not (self.save_dir and self.save_to_disk):
            return False
        if os.path.basename(name) != name:
            raise ValueError(f"a checkpoint's name must not hold a folder, but got {name!r}")
        state = {"model": self.model.state_dict()}
        state.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        state.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        self._replace_file(path, lambda file: torch.save(state, file))
        return True

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        self._replace_file(path, lambda file: file.write(last_filename_basename.encode()))

    def _replace_file(self, path: str, write: Callable[[IO[bytes]], Any]) -> None:
        """Write a file that appears when it is complete; on an exception there is no new file."""
        if "://" in path:  # an object store has no rename, and shows no half-written file either
            with self.path_manager.open(path, "wb") as file:
                write(file)
            return

        def write_aside(aside: Path) -> None:
            with aside.open("wb") as file:
                write(file)

        replace(path, write_aside)


def later_checkpoints(folder: str, start: int) -> list[str]:
    """Return the names of a folder's checkpoints from an iteration on; 0 has the final one, too."""
    if "://" in folder or not os.path.isdir(folder):
        return []
    found = [re.fullmatch(r"model_(\d{7}|final)\.pth", name) for name in os.listdir(folder)]
    return sorted(
        m[0] for m in found if m and (start == 0 if m[1] == "final" else int(m[1]) >= start)
    )


def _of_other_projects(content: dict[str, Any]) -> dict[str, Any]:
    """Return a file of detectron2's zoo as it is, one of Caffe2 or pycls as detectron2 takes it."""
    if "model_state" in content:  # pycls
        author, weights, dropped = "pycls", content["model_state"], "num_batches_tracked"
    elif "model" in content and "__author__" in content:
        return content
    else:  # Detectron's detectors have "blobs", its ImageNet models are flat
        author, weights, dropped = "Caffe2", content.get("blobs", content), "_momentum"
    if isinstance(weights, dict):
        weights = {k: value for k, value in weights.items() if not str(k).endswith(dropped)}
    return {"model": weights, "__author__": author, "matching_heuristics": True}


def _misfit(given: Sequence[str], expected: Sequence[str], loaded: Sequence[str]) -> str | None:
    """Say in one line that weights are of another architecture, if they are.

    Given are the checkpoint's keys, the model's parameters, and those that were loaded.
    """
    if given and expected and not loaded:
        return f"The checkpoint is of another model: none of its {len(given)} keys fits"
    heads = {key.partition(".")[0] for key in expected} - {"backbone"}
    theirs = {key.partition(".")[0] for key in given if "." in key} - {"backbone"}
    whole_detector = theirs and any(key.startswith("backbone.") for key in given)
    if not (whole_detector and heads) or any(key.partition(".")[0] in heads for key in loaded):
        return None
    return (
        f"The checkpoint is of another architecture: it has {', '.join(sorted(theirs))}, and no "
        f"key fits {', '.join(sorted(heads))}, left untrained"
    )
