"""The kernels, in processes of their own: Triton reads at its import how it is to run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rethinking_bn.layers import BatchNorm2d

ROOT = Path(__file__).parents[3]
FOLDER = Path(__file__).parent

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed"
)


def run(*arguments: str, **environment: str) -> str:
    """Run Python on a file beside this one; return what it printed."""
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def cases(*arguments: str, **environment: str) -> str:
    files = [str(FOLDER / "cases" / name) for name in ("rows.py", "layers.py")]
    return run("-m", "pytest", "-q", *arguments, *files, **environment)


@pytest.mark.slow
@pytest.mark.ci
@needs_triton
def test_in_the_interpreter() -> None:
    """Equal to float64 for every row, layout and type; prints the worst errors."""
    printed = cases("-m", "not slow", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    print(printed)
    assert " passed" in printed


@needs_triton
@pytest.mark.slow
def test_all_combinations_in_the_interpreter() -> None:
    print(cases("-m", "slow", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES=""))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    print(cases(TRITON_INTERPRET="0"))


@needs_triton
@pytest.mark.slow
def test_two_processes_equal_one() -> None:
    printed = run(str(FOLDER / "synchronized.py"), TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert "equal" in printed


@pytest.mark.slow
@pytest.mark.ci
@needs_triton
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    """The compiler for sm_90 takes what the interpreter takes: no GPU is needed for that."""
    printed = run(str(FOLDER / "compiled.py"), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    print(printed)
    assert printed.splitlines()[-1].endswith("kernels for sm_90") and "\n0 kernels" not in printed


@needs_triton
@pytest.mark.slow
def test_everything_compiled_ahead_of_time(tmp_path: Path) -> None:
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    print(run(str(FOLDER / "compiled.py"), "--all", **environment))


def test_the_choice_is_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = BatchNorm2d(2), torch.randn(2, 2, 3, 3)
    layer(x)
    monkeypatch.setenv("RETHINKING_BN_KERNELS", "fast")
    with pytest.raises(ValueError, match="one of auto, eager, triton, got 'fast'"):
        layer(x)
    monkeypatch.setenv("RETHINKING_BN_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="RETHINKING_BN_KERNELS=triton, but .*(cpu|imported)"):
        layer(x)
    monkeypatch.setenv("RETHINKING_BN_KERNELS", "eager")
    layer(x)
