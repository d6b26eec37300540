"""Files that are either there in full or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file aside, then give it its name in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        aside = Path(folder) / path.name
        write(aside)
        os.replace(aside, path)


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
