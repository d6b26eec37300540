"""tools/benchmark.py gpu: one line without a GPU, its parts at toy sizes in the interpreter."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}", **environment},
        capture_output=True,
        text=True,
        timeout=290,
    )


def test_one_line_without_a_gpu(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["benchmark.py", "gpu"])
    with pytest.raises(SystemExit, match="^gpu: torch finds no usable GPU here$"):
        runpy.run_path(str(ROOT / "tools" / "benchmark.py"), run_name="__main__")
    assert capsys.readouterr().err == ""


def test_what_fails_is_recorded_and_the_rest_goes_on(monkeypatch, capsys) -> None:
    from benchmarks import Options, gpu
    from benchmarks.report import as_markdown

    def broken(result, options) -> None:
        raise RuntimeError("no kernel image\nand more")

    names = ("_equality", "_waiting", "_kernels", "_wall", "_block_sizes", "time_models")
    for name in (*names, "check_nccl"):
        monkeypatch.setattr(gpu, name, lambda result, options: result.notes.append("ran"))
    broken.__name__ = "_waiting"
    monkeypatch.setattr(gpu, "_waiting", broken)
    result = gpu.run(Options(quick=True))
    assert result.failures == ["waiting: RuntimeError: no kernel image"]
    assert result.notes.count("ran") == 6
    assert "**failed**: waiting" in as_markdown(result) and "Traceback" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed"
)
def test_its_parts_in_the_interpreter() -> None:
    process = run("tests/tools/gpu_quick.py", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert process.returncode == 0, process.stderr
    for part in ("row 1, triton", "Block sizes", "skipped: waiting: needs CUDA"):
        assert part in process.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    """Equality, no waiting, launches: what the command checks, at toy sizes."""
    process = run("tools/benchmark.py", "gpu", "--quick", "--output", str(tmp_path))
    assert process.returncode == 0, process.stderr
    assert "waits" not in process.stdout and (tmp_path / "benchmark_gpu_cuda.md").exists()
