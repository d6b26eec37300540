"""The package as installed: its wheel, and what is left of it without detectron2."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import rethinking_bn
from rethinking_bn.config import list_config_files

ROOT = Path(__file__).parent.parent
GUIDE = "https://detectron2.readthedocs.io/tutorials/install.html"


def run(code: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=cwd or ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def without_detectron2(code: str) -> str:
    """Run code in a process that cannot import detectron2, and return what it printed."""
    result = run(f"import sys; sys.modules['detectron2'] = None\n{code}")
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_layers_and_population_work_without_detectron2() -> None:
    printed = without_detectron2(
        "import torch, rethinking_bn\n"
        "import rethinking_bn.population, rethinking_bn.checkpoint, rethinking_bn.data.shapes\n"
        "import rethinking_bn.torchvision\n"
        "from rethinking_bn.layers import MultiDomainBatchNorm2d\n"
        "print(rethinking_bn.__version__, rethinking_bn.get_config_file('retinanet_gn.yaml'))\n"
        "print(len(MultiDomainBatchNorm2d(4, 2)([torch.randn(2, 4, 3, 3)] * 2)))\n"
        "print([name for name in sys.modules if name.startswith('detectron2')])\n"
    )
    assert rethinking_bn.__version__ in printed and "retinanet_gn.yaml" in printed
    assert printed.splitlines()[1:] == ["2", "['detectron2']"]


STATEMENTS = [
    "from rethinking_bn import add_rethinking_bn_config",
    "import rethinking_bn; rethinking_bn.add_rethinking_bn_config",
    "import rethinking_bn.modeling",
    "import rethinking_bn.engine",
    "import rethinking_bn; rethinking_bn.engine",
    "from rethinking_bn import modeling",
    "from rethinking_bn.engine import PreciseBN",
]


def test_names_bound_to_detectron2_say_what_to_install() -> None:
    printed = without_detectron2(
        f"for statement in {STATEMENTS}:\n"
        "    try:\n        exec(statement)\n"
        "    except ImportError as error:\n        print(error.name, error)\n"
    ).splitlines()
    assert len(printed) == len(STATEMENTS)
    for said in printed:
        assert said.startswith("detectron2 rethinking_bn") and GUIDE in said, said
        assert "pip install" not in said and "git+" not in said


def test_a_broken_detectron2_leaves_the_rest_and_is_not_hidden(tmp_path: Path) -> None:
    """Its torch-only rooms import, and whatever needs it raises what it raised (defect 35)."""
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("import a_library_it_needs\n")
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = run(
        "import rethinking_bn.layers, rethinking_bn.population, rethinking_bn.torchvision",
        **environment,
    )
    assert result.returncode == 0, result.stderr
    said = "No module named 'a_library_it_needs'"
    assert len(result.stderr.splitlines()) == 1 and said in result.stderr
    for statement in (STATEMENTS[0], STATEMENTS[2], STATEMENTS[4]):
        result = run(statement, **environment)
        assert result.returncode != 0
        first, last = result.stderr.index(f"ModuleNotFoundError: {said}"), result.stderr
        assert "direct cause" in last[first:] and "fails to import" in last.splitlines()[-1]
        assert GUIDE not in last


def test_one_import_registers_the_components() -> None:
    pytest.importorskip("detectron2", reason="needs detectron2, which is not installed")
    result = run(
        "import sys, rethinking_bn\n"
        "from detectron2.data import DatasetCatalog\n"
        "from detectron2.modeling import META_ARCH_REGISTRY\n"
        "assert 'ConfigurableHeadRetinaNet' in META_ARCH_REGISTRY\n"
        "assert {'shapes_train', 'shapes_val'} <= {*DatasetCatalog.list()}\n"
        "assert 'rethinking_bn.engine' not in sys.modules and rethinking_bn.engine\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.ci
def test_wheel_holds_package_and_configs(tmp_path: Path) -> None:
    pytest.importorskip("wheel", reason="needs the wheel package to build without an index")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("rethinking_bn", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    # no index, no isolation: what pip would build, with the setuptools that is here
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "-w", str(tmp_path)]
    built = subprocess.run(
        [*pip, *options, str(source)], capture_output=True, text=True, timeout=120
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("rethinking_bn-*.whl")
    assert rethinking_bn.__version__ in wheel.name
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    metadata = next(installed.glob("*.dist-info/METADATA")).read_text()
    assert "Requires-Python: >=3.10" in metadata and "Requires-Dist: torch>=2.4" in metadata
    assert not (installed / "tests").exists() and not (installed / "configs").exists()
    code = (
        "from rethinking_bn.config import get_config_file, list_config_files\n"
        "print(*map(get_config_file, list_config_files()))"
    )
    paths = run(code, cwd=tmp_path, PYTHONPATH=str(installed)).stdout.split()
    assert len(paths) == len(list_config_files())
    assert all(path.startswith(str(installed)) and Path(path).is_file() for path in paths)


def test_the_versions_that_are_promised_are_the_ones_that_are_declared_and_tried() -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    python = re.search(r'requires-python = ">=([\d.]+)"', declared)
    torch = re.search(r'"torch>=([\d.]+)"', declared)
    assert python and torch
    promised = (ROOT / "INSTALL.md").read_text()
    assert f"Python >= {python[1]}" in promised and f"PyTorch >= {torch[1]} " in promised
    tried = (ROOT / ".ci" / "minimum").read_text()
    assert f"python{python[1]}" in tried and re.search(rf"torch=={torch[1]}\.\d", tried)
