"""Imports between the rooms point one way, and the torch-only rooms know no detectron2."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "rethinking_bn"
# from the ground up; what stands beside each other on a floor does not import each other
FLOORS = [
    ["_detectron2", "files", "randomness", "distributed"],
    ["command_line"],
    ["numerics", "shuffle"],
    ["layers"],
    ["population", "checkpoint"],
    ["averaging", "diagnosis", "distillation"],
    ["data", "torchvision", "config", "checkpointer"],
    ["modeling"],
    ["engine"],
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
WITH_DETECTRON2 = {"config", "checkpointer", "modeling", "engine"}


@cache
def imports() -> list[tuple[Path, str, str]]:
    """Return (file, room, imported module) for every import of the package."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file} imports relatively; elsewhere imports are absolute"
                found.append((file, room, node.module or ""))
            elif isinstance(node, ast.Import):
                found += [(file, room, alias.name) for alias in node.names]
    return found


def test_no_arrow_runs_up() -> None:
    up = []
    for file, room, module in imports():
        parts = module.split(".")
        if room == "__init__" or parts[0] != "rethinking_bn" or len(parts) == 1:
            continue
        assert parts[1] in FLOOR, f"{file} imports a room that no floor has: {module}"
        if parts[1] != room and FLOOR[parts[1]] >= FLOOR[room]:
            up.append(f"{file.relative_to(PACKAGE)} -> {module}")
    assert not up


def test_rooms_without_detectron2() -> None:
    # what registers the data set, and what marks the domains of detectron2's
    of_detectron2 = {PACKAGE / "data" / "register.py", PACKAGE / "data" / "domains.py"}
    found = {
        str(file.relative_to(PACKAGE))
        for file, room, module in imports()
        if module.split(".")[0] == "detectron2"
        and room not in WITH_DETECTRON2
        and file not in of_detectron2
    }
    assert not found


def test_no_file_is_too_long() -> None:
    lengths = {
        str(file.relative_to(PACKAGE)): len(file.read_text(encoding="utf-8").splitlines())
        for file in PACKAGE.rglob("*.py")
    }
    assert {name: lines for name, lines in lengths.items() if lines > 350} == {}
