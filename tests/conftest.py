"""Tests that need detectron2 are skipped, with that reason, where it is not installed."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

from rethinking_bn._detectron2 import detectron2_installed

# Tensors in tests are small, and several processes share the cores: more threads only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

REASON = "needs detectron2, which is not installed"


def _for_want_of_detectron2(error: BaseException | None) -> bool:
    missing = isinstance(error, ImportError) and (error.name or "").split(".")[0] == "detectron2"
    return missing and not detectron2_installed()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Skip a test module whose imports end in a missing detectron2."""
    report = yield
    failure = getattr(report, "call", None) and report.call.excinfo
    if failure and _for_want_of_detectron2(failure.value.__cause__):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {REASON}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Skip a test that finds out later that detectron2 is missing."""
    try:
        return (yield)
    except ImportError as error:
        if _for_want_of_detectron2(error):
            pytest.skip(REASON)
        raise


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """Start every test from the same random state, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    """Undo what a test's command line set up: detectron2's loggers hide records from caplog."""
    loggers = [logging.getLogger(name) for name in ("rethinking_bn", "detectron2", "fvcore")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)  # as if set up: a trainer then leaves them alone
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.propagate = propagate
        logger.setLevel(level)
