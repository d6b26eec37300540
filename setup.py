"""Packaging; the settings of the tools (pytest, ruff, mypy) are in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


STUDIES = ["matplotlib", "numpy", "Pillow", "pycocotools", "scikit-learn", "tqdm"]
DETECTION = [
    "fvcore",
    "matplotlib",
    "numpy",
    "opencv-python",
    "Pillow",
    "pycocotools",
    "PyYAML",
    "tqdm",
]
TEST = [
    "hypothesis",
    "mypy",
    "pytest",
    "pytest-random-order",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
]
EXTRAS = {
    # tools/run_study.py and the shapes data set, without detectron2
    "studies": STUDIES,
    # what we import beside detectron2, which is on no package index
    "detection": DETECTION,
    # the kernels for GPUs run in Triton's interpreter
    "test": [*TEST, *STUDIES, "triton; platform_system == 'Linux'"],
}


def read_version() -> str:
    """Return ``__version__`` without importing the package, whose imports are not built yet."""
    text = (ROOT / "rethinking_bn" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+?)"', text, re.MULTILINE)
    if found is None:
        raise RuntimeError("rethinking_bn/__init__.py has no __version__ line")
    return found.group(1)


def read_readme() -> str:
    """Return README.md, the description shown by package indexes."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="rethinking-bn",
    version=read_version(),
    description="BatchNorm in detectors where the batch is a choice: heads, statistics, training",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # configs/ lives at the root, where people look for it; in a wheel it becomes package data.
    packages=[*find_packages(include=["rethinking_bn*"]), "rethinking_bn.configs"],
    package_dir={"rethinking_bn.configs": "configs"},
    package_data={"rethinking_bn.configs": ["*.yaml", "*/*.yaml"], "rethinking_bn": ["py.typed"]},
    install_requires=["torch>=2.4", "torchvision"],
    extras_require=EXTRAS,
    zip_safe=False,
)
