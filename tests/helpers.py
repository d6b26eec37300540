"""Run a function on several gloo processes and collect what each rank returned."""

from __future__ import annotations

import contextlib
import datetime
import io
import multiprocessing
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# The server imports torch and the package once and forks a clean process per rank: much quicker
# than "spawn", and without the threads and locks a fork of the test process itself would inherit.
# What needs detectron2 it does without where that is missing.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch.distributed",
        "rethinking_bn.layers",
        "rethinking_bn.modeling",
        "rethinking_bn.engine",
    ]
)


def _dump(value: Any) -> bytes:
    # Tensors sent as they are would be shared memory that dies with the sending process.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _load(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _worker(
    connection: Connection,
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    init_file: str,
    timeout: float,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{init_file}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        connection.send((True, _dump(fn(rank, *args))))
    except BaseException:
        connection.send((False, traceback.format_exc()))
    finally:
        connection.close()


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 90
) -> list[Any]:
    """Call ``fn(rank, *args)`` on ``world_size`` gloo processes.

    Args:
        fn: a picklable (module-level) function; one thread, default process group initialised.
        timeout: seconds for the whole call; processes still alive then are killed.

    Returns:
        the ranks' return values (picklable), rank 0 first.

    Raises:
        RuntimeError: with the traceback of every rank that raised.
        TimeoutError: naming the ranks that had not returned.
    """
    # Spares a restart of the server for the import path of the calling test module.
    with tempfile.TemporaryDirectory() as folder:
        pipes: list[Connection] = []
        processes = []
        for rank in range(world_size):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_worker,
                args=(sender, fn, rank, world_size, f"{folder}/init", timeout, args),
                daemon=True,
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, timeout)
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    deadline = datetime.datetime.now() + datetime.timedelta(seconds=timeout)
    results: dict[int, tuple[bool, Any]] = {}
    while len(results) < len(pipes):
        left = (deadline - datetime.datetime.now()).total_seconds()
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(left, 0))
        if not ready:
            late = [rank for rank in range(len(pipes)) if rank not in results]
            said = [text for ok, text in results.values() if not ok]
            raise TimeoutError("\n".join([f"ranks {late} did not return in {timeout} s", *said]))
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                results[pipes.index(pipe)] = pipe.recv()
            except EOFError:
                results[pipes.index(pipe)] = (False, "the process ended without an answer")
    failures = [f"rank {rank}:\n{results[rank][1]}" for rank in results if not results[rank][0]]
    if failures:
        raise RuntimeError("\n".join(failures))
    return [_load(results[rank][1]) for rank in range(len(pipes))]


@contextlib.contextmanager
def tracer_warnings_ignored() -> Iterator[None]:
    """Ignore what torch says of every trace: checks in Python are not part of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield
