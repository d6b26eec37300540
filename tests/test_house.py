"""The house's rules: imports point down, in no circle, to what is declared; no long files."""

from __future__ import annotations

import ast
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rethinking_bn"
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
# distributions whose modules have another name, and what comes along or is ours
NAMES = {"PIL": "Pillow", "cv2": "opencv-python", "sklearn": "scikit-learn", "yaml": "PyYAML"}
NO_EXTRAS = {"detectron2", "iopath", "omegaconf", "yacs", "torch", "torchvision", "rethinking_bn"}
NO_EXTRAS |= {*sys.stdlib_module_names, *(path.stem for path in (ROOT / "tools").iterdir())}


def module_of(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> list[tuple[str, str, bool]]:
    """Return (module, what it imports, at module level?) for every import of the package."""
    found = []

    def visit(module: str, node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom):
                assert not child.level, f"{module} imports relatively; elsewhere it is absolute"
                found.append((module, child.module or "", top))
                found.extend((module, f"{child.module}.{a.name}", top) for a in child.names)
            elif isinstance(child, ast.Import):
                found.extend((module, alias.name, top) for alias in child.names)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                visit(module, child, False)
            else:
                inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                visit(module, child, top and not inner)

    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        visit(module_of(file, ROOT), tree, True)
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_no_arrow_runs_up() -> None:
    up = set()
    for module, imported, _ in imports():
        room, parts = room_of(module), imported.split(".")
        if room == "__init__" or parts[0] != "rethinking_bn" or len(parts) == 1:
            continue
        if not (PACKAGE / parts[1]).exists() and not (PACKAGE / f"{parts[1]}.py").exists():
            continue  # a name of rethinking_bn itself
        assert parts[1] in FLOOR, f"{module} imports a room that no floor has: {imported}"
        if parts[1] != room and FLOOR[parts[1]] >= FLOOR[room]:
            up.add(f"{module} -> {parts[1]}")
    assert not up


def test_no_circle_at_module_level() -> None:
    modules = {module_of(file, ROOT) for file in PACKAGE.rglob("*.py")}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for module, imported, top in imports():
        if top and imported in modules and imported != module and module != "rethinking_bn":
            # a room's __init__ only passes on what its files define
            if not imported.startswith(f"{module}.") and imported != "rethinking_bn":
                graph[module].add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_rooms_without_detectron2() -> None:
    # what registers data sets, and what marks the domains of detectron2's
    of_detectron2 = {f"rethinking_bn.data.{name}" for name in ("register", "domains")}
    found = {
        module
        for module, imported, _ in imports()
        if imported.split(".")[0] == "detectron2"
        and room_of(module) not in WITH_DETECTRON2
        and module not in of_detectron2
    }
    assert not found


def distributions(*patterns: str) -> set[str]:
    """Return the distributions that files import, beside torch and the standard library."""
    found: set[str] = set()
    for file in (file for pattern in patterns for file in ROOT.glob(pattern)):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").split(".")[0])
    assert found
    return {NAMES.get(name, name) for name in found - NO_EXTRAS}


def test_an_extra_declares_what_its_part_imports() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    studies, detection = (
        set(project["optional-dependencies"][n]) for n in ("studies", "detection")
    )
    shapes = "rethinking_bn/data/[!r]*.py"  # all but what registers them
    assert distributions("tools/studies/*.py", "tools/run_study.py", shapes) == studies
    rooms = [f"rethinking_bn/{room}*/*.py" for room in ("modeling", "engine", "data")]
    files = ("rethinking_bn/c*.py", "tools/*.py", "tools/benchmarks/precise_bn.py")
    assert distributions(*rooms, *files) == detection
    assert distributions("tools/**/*.py") <= studies | detection
    rest = FLOOR.keys() - WITH_DETECTRON2 - {"data"}
    torch_only = [f"rethinking_bn/{room}{end}" for room in rest for end in (".py", "/*.py")]
    assert distributions(*torch_only) <= {"matplotlib", "typing_extensions"}


def test_no_file_is_too_long() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {str(file): lines for file, lines in lengths.items() if lines > 350} == {}
