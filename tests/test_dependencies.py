"""What is declared is what is imported, extra by extra."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rethinking_bn"
# distributions whose modules have another name
NAMES = {"PIL": "Pillow", "cv2": "opencv-python", "sklearn": "scikit-learn", "yaml": "PyYAML"}
OURS = {"rethinking_bn", *(path.stem for path in (ROOT / "tools").iterdir())}
WITH_DETECTRON2 = {"detectron2", "iopath", "omegaconf", "yacs"}  # it brings them along
DETECTION = [
    *PACKAGE.glob("modeling/*.py"),
    *PACKAGE.glob("engine/*.py"),
    *(PACKAGE / name for name in ("config.py", "checkpointer.py")),
    *(PACKAGE / "data" / f"{name}.py" for name in ("register", "dataset", "storage", "shapes")),
    *(p for p in (ROOT / "tools").glob("*.py") if p.stem not in ("benchmark", "run_study")),
    ROOT / "tools" / "benchmarks" / "precise_bn.py",  # beside fvcore's
]
STUDIES = [
    *(ROOT / "tools" / "studies").glob("*.py"),
    *(p for p in PACKAGE.glob("data/*.py") if p.stem != "register"),
    ROOT / "tools" / "run_study.py",
]
BASE = sorted(
    set(PACKAGE.rglob("*.py")) - set(DETECTION) - set(STUDIES) - set(PACKAGE.glob("data/*.py"))
)


def declared(name: str) -> set[str]:
    """Return an extra of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project["optional-dependencies"][name])


def imported(files: Iterable[Path]) -> set[str]:
    """Return the distributions that files import, beside torch and the standard library."""
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").split(".")[0])
    found -= OURS | WITH_DETECTRON2 | {"torch", "torchvision"} | set(sys.stdlib_module_names)
    return {NAMES.get(name, name) for name in found}


@pytest.mark.parametrize(("files", "name"), [(STUDIES, "studies"), (DETECTION, "detection")])
def test_an_extra_declares_what_its_part_imports(files: list[Path], name: str) -> None:
    assert len(files) > 5
    assert imported(files) == declared(name)


def test_the_rest_needs_torch_alone() -> None:
    # pictures of a diagnosis, and annotations
    assert imported(BASE) <= {"matplotlib", "typing_extensions"}


def test_what_stands_beside_the_tools_imports_nothing_else() -> None:
    files = [ROOT / "tools" / "benchmark.py", *(ROOT / "tools").glob("*/**/*.py")]
    assert imported(files) <= declared("studies") | declared("detection")
