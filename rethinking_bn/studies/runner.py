"""Run a study seed by seed: finished seeds are kept, found again, and reported."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rethinking_bn.files import read_json, write_json
from rethinking_bn.randomness import isolated_random_state
from rethinking_bn.studies.environment import describe_environment
from rethinking_bn.studies.report import as_text, plot, summarise, write_csv
from rethinking_bn.studies.study import Settings, Study

_PACKAGES = ("scikit-learn", "matplotlib", "pycocotools", "Pillow")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; ``report`` is that of the finished seeds, None if there are none."""

    def __init__(self, report: dict[str, Any] | None) -> None:
        super().__init__()
        self.report = report


def run_study(
    study: Study,
    folder: Path,
    *,
    seeds: Sequence[int],
    quick: bool = False,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Run the seeds that are not finished yet and report on all of them.

    Args:
        folder: gets ``seed_<n>.json`` as each seed ends, then ``<study>.json``, ``.csv``, ``.png``.
            Seeds found there are taken as they are if their settings and device are these.
        seeds: which, in this order.
        quick: small settings, to see that everything works.

    Returns:
        The report, as in the JSON.

    Raises:
        Interrupted: on Ctrl-C, after the finished seeds were reported.
        FloatingPointError: when a quantity is not finite.
    """
    device = torch.device("cpu") if device is None else device
    settings = study.quick if quick else study.settings
    identity = {"study": study.name, "settings": dict(settings), "device": device.type}
    finished: dict[int, dict[str, Any]] = {}
    for seed in seeds:
        record = read_json(_path(folder, seed))
        if record is not None and record.get("identity") == identity and _complete(study, record):
            finished[seed] = record
    if finished:
        tqdm.write(f"{study.name}: seeds {sorted(finished)} are finished, found in {folder}")
    todo = [seed for seed in seeds if seed not in finished]
    bar = tqdm(total=study.parts * len(todo), desc=study.name, unit="part", disable=not todo)
    try:
        with bar:
            for seed in todo:
                finished[seed] = _run_seed(study, settings, seed, device, bar)
                finished[seed]["identity"] = identity
                write_json(_path(folder, seed), finished[seed])
    except KeyboardInterrupt:
        raise Interrupted(_report(study, folder, finished, settings, quick, device)) from None
    report = _report(study, folder, finished, settings, quick, device)
    assert report is not None  # no seeds is a usage error, caught by the command line
    return report


def _path(folder: Path, seed: int) -> Path:
    return folder / f"seed_{seed}.json"


def _complete(study: Study, record: dict[str, Any]) -> bool:
    values = record.get("values")
    return isinstance(values, dict) and set(values) == set(study.keys())


def _run_seed(
    study: Study, settings: Settings, seed: int, device: torch.device, bar: Any
) -> dict[str, Any]:
    start = time.perf_counter()
    values: dict[str, float] = {}
    with isolated_random_state(seed, [device]):
        for part in study.run(settings, seed, device):
            values.update(part)
            bar.update()
    for key, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{study.name}, seed {seed}: {key} is {value}")
    ordered = {key: values[key] for key in study.keys()}
    return {"seed": seed, "seconds": round(time.perf_counter() - start, 1), "values": ordered}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _report(
    study: Study,
    folder: Path,
    finished: dict[int, dict[str, Any]],
    settings: Settings,
    quick: bool,
    device: torch.device,
) -> dict[str, Any] | None:
    if not finished:
        return None
    seeds = sorted(finished)
    values = {key: [finished[s]["values"][key] for s in seeds] for key in study.keys()}
    environment = describe_environment(device)
    for package in _PACKAGES:
        environment[package] = _version(package)
    report = {
        "study": study.name,
        "title": study.title,
        "source": study.source,
        "quick": quick,
        "settings": dict(settings),
        "seeds": seeds,
        "seconds": [finished[seed]["seconds"] for seed in seeds],
        "environment": environment,
        "values": values,
        **summarise(study, values),
    }
    write_csv(folder / f"{study.name}.csv", report)
    plot(folder / f"{study.name}.png", study, report)
    write_json(folder / f"{study.name}.json", report)  # last: it says that all is there
    tqdm.write(as_text(report))
    tqdm.write(f"written to {folder}: {study.name}.json, .csv, .png")
    return report
