"""Checkpoint files that are either complete or not there, and need not be the last one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from rethinking_bn.files import replace


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer, writing every file aside and renaming it.

    A run killed while it saves leaves the previous checkpoint and ``last_checkpoint`` as they
    were. (fvcore's writes to the final path.)
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model, the checkpointables and ``kwargs``, and tag the file as the last one.

        Args:
            name: file name without folder and ".pth".

        Raises:
            ValueError: if ``name`` names a folder too.
        """
        if self._writes():
            self.save_untagged(name, **kwargs)
            self.tag_last_checkpoint(f"{name}.pth")

    def save_untagged(self, name: str, **kwargs: Any) -> None:
        """Save like :meth:`save`, but leave ``last_checkpoint`` alone.

        For files that no training should resume from, such as re-estimated statistics.
        """
        if not self._writes():
            return
        if os.path.basename(name) != name:
            raise ValueError(f"a checkpoint's name must not hold a folder, but got {name!r}")
        state = {"model": self.model.state_dict()}
        state.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        state.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        self._replace_file(path, lambda file: torch.save(state, file))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Let ``last_checkpoint`` name this file."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        self._replace_file(path, lambda file: file.write(last_filename_basename.encode()))

    def _writes(self) -> bool:
        return bool(self.save_dir) and self.save_to_disk

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
    """Return the names of the checkpoints in a folder that are of iteration ``start`` or later.

    A "model_final.pth" says no iteration: it counts where training starts anew.
    """
    if "://" in folder or not os.path.isdir(folder):
        return []
    found = {name: re.fullmatch(r"model_(\d{7}|final)\.pth", name) for name in os.listdir(folder)}
    return sorted(
        name
        for name, match in found.items()
        if match and (start == 0 if match[1] == "final" else int(match[1]) >= start)
    )
