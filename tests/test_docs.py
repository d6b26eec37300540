"""README and the pages: their links lead somewhere, their code names and options exist."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import runpy
import shlex
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest

from rethinking_bn._detectron2 import detectron2_installed

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as its renderers make them."""
    headings = re.findall(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {word.replace(" ", "-") for word in words}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if not re.match(r"https?:|mailto:", link):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pages
def test_imported_names_exist(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        imports = [n for n in ast.walk(ast.parse(block)) if isinstance(n, ast.ImportFrom)]
        for name, aliases in ((node.module or "", node.names) for node in imports):
            with_detectron2 = name in ("rethinking_bn.engine", "rethinking_bn")
            if name.startswith("rethinking_bn") and (detectron2_installed() or not with_detectron2):
                module = importlib.import_module(name)
                assert all(hasattr(module, alias.name) for alias in aliases), f"{page.name}: {name}"


@cache
def options_of(tool: str) -> list[str]:
    """Return what a tool's --help names, run in this process: most have imported detectron2."""
    path, printed = ROOT / "tools" / tool, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", [str(path), "--help"])
        patch.setattr(sys, "path", [str(path.parent), *sys.path])
        patch.setenv("PYTHONWARNINGS", "ignore")  # or a tool sets it
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
    assert not ended.value.code
    return re.findall(r"--[\w-]+", printed.getvalue())


@pages
def test_commands_have_these_options(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for tool, rest in re.findall(r"python tools/(\w+\.py)([^`\n#&|]*)", text):
        assert (ROOT / "tools" / tool).is_file(), f"{page.name}: {tool}"
        words = shlex.split(rest.replace("'", ""), comments=True)
        for option in (word.split("=")[0] for word in words if word.startswith("--")):
            if detectron2_installed() or tool in ("run_study.py", "benchmark.py"):
                assert option in options_of(tool), f"{page.name}: {tool} {rest}"
        for config in re.findall(r"configs/[\w/]+\.yaml", rest):
            assert (ROOT / config).is_file(), f"{page.name}: {config}"


def test_every_page_is_on_the_site() -> None:
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    docs = ROOT / "docs"
    assert set(listed) == {str(page.relative_to(docs)) for page in docs.rglob("*.md")}


def test_the_face_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160
