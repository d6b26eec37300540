"""The kernels or a failure, in every case; at the end what they found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rethinking_bn.numerics.triton import plan
from tests.numerics.triton.cases.harness import CASES, DEVICE, WORST


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the kernels or fail; undo what a test does to the plans."""
    monkeypatch.setenv("RETHINKING_BN_KERNELS", "triton")
    plan.make_plan.cache_clear()
    yield
    plan.make_plan.cache_clear()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles for a tensor and blocks for a tile, at sizes that an interpreter can do."""
    monkeypatch.setattr(plan, "BLOCK", 8 if DEVICE.type == "cpu" else 128)
    monkeypatch.setattr(plan, "BLOCKS", 2)
    monkeypatch.setattr(plan, "CHANNELS_LAST_BYTES", 8 if DEVICE.type == "cpu" else 64)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how far from float64 the worst float32 values were, relative to the largest."""
    found = ", ".join(f"{name} {error:.1e}" for name, error in sorted(WORST.items()))
    terminalreporter.write_line(f"{CASES[0]} cases on {DEVICE.type}; worst errors: {found}")
