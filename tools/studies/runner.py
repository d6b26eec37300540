"""Run a study seed by seed: what is finished is kept, found again, and reported."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rethinking_bn.files import read_json, write_json
from rethinking_bn.randomness import isolated_random_state
from studies.environment import describe_environment
from studies.processes import run_beside
from studies.report import as_text, plot, summarise, write_csv
from studies.study import Part, Settings, Study, Values

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
    everything: bool = False,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Run the seeds that are not finished yet and report on all of them.

    Args:
        folder: gets ``seed_<n>.json`` as each seed ends or a part gives a value, then
            ``<study>.json``, ``.csv``, ``.png``. What is found there is taken as it is if its
            settings and device are these.
        seeds: which, in this order.
        quick: small settings, to see that everything works.
        everything: measure what the study holds back by default, too.

    Returns:
        The report, as in the JSON.

    Raises:
        Interrupted: on Ctrl-C, after the finished seeds were reported.
        FloatingPointError: when a quantity is not finite.
    """
    device = torch.device("cpu") if device is None else device
    settings = study.quick if quick else study.settings
    identity = {"study": study.name, "settings": dict(settings), "device": device.type}
    wanted = study.keys(everything)
    finished: dict[int, dict[str, Any]] = {}
    begun: dict[int, dict[str, Any]] = {}
    for seed in seeds:
        record = read_json(_path(folder, seed))
        if record is None or record.get("identity") != identity:
            continue
        done = set(wanted) <= set(record["values"])
        (finished if done else begun)[seed] = record
    if finished:
        tqdm.write(f"{study.name}: seeds {sorted(finished)} are finished, found in {folder}")
    todo = [seed for seed in seeds if seed not in finished]
    total, unit = study.parts * len(todo), "part"
    if study.ticks is not None:
        unit = "step"
        missing = [set(wanted).difference(begun.get(s, {"values": ()})["values"]) for s in todo]
        first, more = study.ticks(settings)
        total = first * sum(bool(keys.difference(study.more)) for keys in missing)
        total += more * sum(bool(keys.intersection(study.more)) for keys in missing)
    bar = tqdm(total=total, desc=study.name, unit=unit, disable=not todo)
    try:
        with bar:
            for seed in todo:
                record = begun.get(seed, {"seed": seed, "seconds": 0.0, "values": {}})
                record["identity"] = identity
                _run_seed(study, settings, record, wanted, _path(folder, seed), device, bar)
                finished[seed] = record
    except KeyboardInterrupt:
        raise Interrupted(
            _report(study, folder, finished, settings, wanted, quick, device)
        ) from None
    report = _report(study, folder, finished, settings, wanted, quick, device)
    assert report is not None  # no seeds is a usage error, caught by the command line
    return report


def _path(folder: Path, seed: int) -> Path:
    return folder / f"seed_{seed}.json"


def _run_seed(
    study: Study,
    settings: Settings,
    record: dict[str, Any],
    wanted: Sequence[str],
    path: Path,
    device: torch.device,
    bar: Any,
) -> None:
    """Bring a seed's record to its end; it is written with each value of a part."""
    start, before = time.perf_counter(), record["seconds"]
    values: dict[str, float] = record["values"]
    options = {} if study.ticks is None else {"tick": bar.update}

    def take(new: dict[str, float]) -> None:
        for key, value in new.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{study.name}, seed {record['seed']}: {key} is {value}")
            tqdm.write(f"{study.name}, seed {record['seed']}: {key} {value:.1f}")
        values.update(new)
        record["seconds"] = round(before + time.perf_counter() - start, 1)
        if study.ticks is None:
            bar.update()

    with isolated_random_state(record["seed"], [device]):
        parts: list[Part] = []
        for part in study.run(settings, record["seed"], device, **options):
            if isinstance(part, Part):
                parts.append(part)
            else:
                take(part)
        todo = [i for i, p in enumerate(parts) if {*p.keys}.intersection(wanted).difference(values)]
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        if len(todo) > 1 and threads > 1:
            ticks = study.ticks is not None
            jobs = [(study.run, settings, record["seed"], device, i, ticks) for i in todo]
            results = _beside(jobs, threads, bar.update)
        else:
            results = (v for i in todo for v in _values(parts[i], record["seed"], device))
        with closing(results):
            for new in results:
                take(new)
                write_json(path, record)
    record["values"] = {key: values[key] for key in study.keys() if key in values}
    write_json(path, record)


def _beside(
    jobs: Sequence[tuple[Any, ...]], threads: int, tick: Callable[[int], Any]
) -> Generator[Values, None, None]:
    """Yield the values of parts that all run at once: one thread a part keeps a core busier."""
    with closing(run_beside(_run_part, jobs, threads)) as sent:
        for new in sent:
            if isinstance(new, int):
                tick(new)
            else:
                yield new


def _run_part(
    run: Callable[..., Iterator[Part]],
    settings: Settings,
    seed: int,
    device: torch.device,
    index: int,
    ticks: bool,
    send: Callable[[Values | int], None],
) -> None:
    options: Any = {"tick": lambda steps=1: send(steps)} if ticks else {}
    parts = [p for p in run(settings, seed, device, **options) if isinstance(p, Part)]
    for new in _values(parts[index], seed, device):
        send(new)


def _values(part: Part, seed: int, device: torch.device) -> Iterator[Values]:
    """Run a part; what it draws depends on the seed alone, not on the parts before."""
    with isolated_random_state(seed, [device]):
        yield from part.run()


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
    wanted: Sequence[str],
    quick: bool,
    device: torch.device,
) -> dict[str, Any] | None:
    if not finished:
        return None
    seeds = sorted(finished)
    values = {key: [finished[s]["values"][key] for s in seeds] for key in wanted}
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
    if quick:
        report["claims"] = []  # so little training shows nothing
    write_csv(folder / f"{study.name}.csv", report)
    drawn = any(value for of_key in values.values() for value in of_key)
    if drawn:
        plot(folder / f"{study.name}.png", study, report)
    write_json(folder / f"{study.name}.json", report)  # last: it says that all is there
    tqdm.write(as_text(report))
    pictures = ".png" if drawn else "no picture, as every value is 0"
    tqdm.write(f"written to {folder}: {study.name}.json, .csv, {pictures}")
    return report
