"""Run a study seed by seed: what is finished is kept, found again, and reported."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from machine.environment import describe_environment
from machine.processes import run_beside
from rethinking_bn.files import read_json, write_json
from rethinking_bn.randomness import isolated_random_state
from studies.report import as_text, plot, summarise
from studies.study import Part, Settings, Study, Values

Record = dict[str, Any]  # of one seed, as in its JSON


def run_study(
    study: Study,
    folder: Path,
    *,
    seeds: Sequence[int],
    quick: bool = False,
    everything: bool = False,
    device: torch.device | None = None,
) -> None:
    """Run the seeds that are not finished yet and report on all of them.

    Args:
        folder: gets ``seed_<n>.json`` as each seed ends or a part gives a value, then
            ``<study>.json`` and ``.png``. What is found there is taken as it is if its
            settings and device are these.
        seeds: which, in this order; one at least.
        quick: small settings, to see that everything works.
        everything: measure what the study holds back by default, too.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after the finished seeds were reported.
        FloatingPointError: when a quantity is not finite.
    """
    device = torch.device("cpu") if device is None else device
    settings = {**study.settings, **(study.quick if quick else {})}
    wanted = study.keys(everything)
    identity = {"study": study.name, "settings": settings, "device": device.type}
    records: dict[int, Record] = {}
    for seed in seeds:
        found = read_json(_path(folder, seed))
        known = found is not None and found.get("identity") == identity
        records[seed] = found if known else {"identity": identity, "seconds": 0.0, "values": {}}
    missing = {seed: set(wanted).difference(r["values"]) for seed, r in records.items()}
    finished = [seed for seed in seeds if not missing[seed]]
    if finished:
        print(f"{study.name}: seeds {finished} are finished, found in {folder}")
    todo = [seed for seed in seeds if missing[seed]]
    if todo and study.seconds is not None:
        with isolated_random_state(0, [device]):
            each = study.seconds(settings, sorted(missing[todo[0]]), device)
        minutes = f"{each / 60:.1f} minutes" if each > 90 else f"{each:.0f} seconds"
        print(f"{study.name}: a seed takes about {minutes} here", flush=True)
    try:
        total = sum(len(missing[seed]) for seed in todo)
        with tqdm(total=total, desc=study.name, unit="value", disable=not todo) as bar:
            for seed in todo:
                _run_seed(study, settings, seed, records[seed], wanted, folder, device, bar)
                finished.append(seed)
    finally:
        if finished:
            _report(study, folder, records, sorted(finished), wanted, quick, device)


def _path(folder: Path, seed: int) -> Path:
    return folder / f"seed_{seed}.json"


def _run_seed(
    study: Study,
    settings: Settings,
    seed: int,
    record: Record,
    wanted: Sequence[str],
    folder: Path,
    device: torch.device,
    bar: Any,
) -> None:
    """Bring a seed's record to its end; it is written with each value of a part."""
    start, before = time.perf_counter(), record["seconds"]
    values: Values = record["values"]

    def take(new: Values) -> None:
        for key, value in new.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{study.name}, seed {seed}: {key} is {value}")
            tqdm.write(f"{study.name}, seed {seed}: {key} {value:.1f}")
        bar.update(len(new))
        values.update(new)
        record["seconds"] = round(before + time.perf_counter() - start, 1)

    with isolated_random_state(seed, [device]):
        parts: list[Part] = []
        for part in study.run(settings, seed, device):
            if isinstance(part, Part):
                parts.append(part)
            else:
                take(part)
        todo = [i for i, p in enumerate(parts) if {*p.keys}.intersection(wanted).difference(values)]
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        if len(todo) > 1 and threads > 1:  # one thread a part keeps a core busier than two for one
            jobs = [(study.run, settings, seed, device, index) for index in todo]
            results: Generator[Values, None, None] = run_beside(_run_part, jobs, threads)
        else:
            results = (v for i in todo for v in _values(parts[i], seed, device))
        with closing(results):
            for new in results:
                take(new)
                write_json(_path(folder, seed), record)
    record["values"] = {key: values[key] for key in study.keys() if key in values}
    write_json(_path(folder, seed), record)


def _run_part(
    run: Any, settings: Settings, seed: int, device: torch.device, index: int, send: Any
) -> None:
    parts = [part for part in run(settings, seed, device) if isinstance(part, Part)]
    for new in _values(parts[index], seed, device):
        send(new)


def _values(part: Part, seed: int, device: torch.device) -> Iterator[Values]:
    """Run a part; what it draws depends on the seed alone, not on the parts before."""
    with isolated_random_state(seed, [device]):
        yield from part.run()


def _report(
    study: Study,
    folder: Path,
    records: dict[int, Record],
    seeds: Sequence[int],
    wanted: Sequence[str],
    quick: bool,
    device: torch.device,
) -> None:
    values = {key: [records[seed]["values"][key] for seed in seeds] for key in wanted}
    report = {
        "study": study.name,
        "title": study.title,
        "source": study.source,
        "quick": quick,
        "settings": records[seeds[0]]["identity"]["settings"],
        "seeds": seeds,
        "seconds": [records[seed]["seconds"] for seed in seeds],
        "environment": describe_environment(device),
        "values": values,
        **summarise(study, values),
    }
    if quick:
        report["claims"] = []  # so little training shows nothing
    drawn = any(value for of_key in values.values() for value in of_key)
    if drawn:
        plot(folder / f"{study.name}.png", study, report)
    write_json(folder / f"{study.name}.json", report)  # last: it says that all is there
    print(as_text(report))
    pictures = ".png" if drawn else "no picture, as every value is 0"
    print(f"written to {folder}: {study.name}.json, {pictures}")
