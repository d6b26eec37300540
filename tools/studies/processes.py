"""Run one function on several processes of this machine: together, as ranks, or side by side."""

from __future__ import annotations

import datetime
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# The server imports everything once and forks a clean process per rank, quicker than starting each.
_CONTEXT: Any = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", __name__])


def run_processes(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    device: torch.device | None = None,
    timeout: float = 240.0,
    expected: type[Exception] | tuple[()] = (),
) -> list[Any]:
    """Call ``function(device, *args)`` on ``world`` processes, each with one thread.

    Args:
        function: defined at the top of a module; returns plain values. The default process group
            is there: nccl on GPUs, gloo on CPUs.
        device: kind of device, "cpu" by default; on GPUs, rank r gets number r.
        timeout: seconds for everything; processes still there then are ended.
        expected: an exception that is an answer too: raised here with its message, when a rank did.

    Returns:
        What the ranks returned, rank 0 first.

    Raises:
        RuntimeError: when a rank raised anything not expected, with its traceback.
        TimeoutError: when ranks have not answered in time.
    """
    device = torch.device("cpu") if device is None else device
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            target = (sender, function, rank, world, folder, device, timeout, expected, args)
            process = _CONTEXT.Process(target=_worker, args=target, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        done = False
        try:
            results = _collect(pipes, timeout)
            done = True
            return results
        finally:
            for process in processes:
                process.join(timeout=10 if done else 0)
                if process.is_alive():  # left waiting for a rank that failed
                    process.kill()
                    process.join()


def _worker(
    sender: Connection,
    function: Callable[..., Any],
    rank: int,
    world: int,
    folder: str,
    device: torch.device,
    timeout: float,
    expected: type[Exception] | tuple[()],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        if device.type == "cuda":
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{folder}/meeting_point",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout),
        )
        sender.send(("done", function(device, *args)))
        dist.barrier()
        dist.destroy_process_group()
    except expected as error:
        sender.send(("expected", type(error)(f"rank {rank}: {error}")))
    except BaseException:
        sender.send(("failed", f"rank {rank}:\n{traceback.format_exc()}"))
    finally:
        sender.close()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            late = [rank for rank in range(len(pipes)) if rank not in results]
            raise TimeoutError(f"ranks {late} have not answered in {timeout:.0f} s")
        for rank, pipe in enumerate(pipes):
            if rank in results or pipe not in ready:
                continue
            try:
                outcome, value = pipe.recv()
            except EOFError:
                outcome, value = "failed", f"rank {rank} ended without an answer"
            if outcome != "done":
                raise value if outcome == "expected" else RuntimeError(value)
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def run_beside(
    function: Callable[..., None], jobs: Sequence[tuple[Any, ...]], threads: int
) -> Generator[Any, None, None]:
    """Call ``function(*job, send)`` for all jobs at once, each on a process of its own.

    Args:
        function: defined at the top of a module; calls ``send`` with plain values.
        threads: of all processes together; each has one at least.

    Yields:
        what the jobs send, as it comes.

    Raises:
        RuntimeError: when a job raised, with its traceback, or its process was killed.
    """
    processes: dict[Connection, Any] = {}
    try:
        for job in jobs:
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            arguments = (sender, function, job, max(1, threads // len(jobs)))
            process = _CONTEXT.Process(target=_job, args=arguments, daemon=True)
            process.start()
            processes[receiver] = process
            sender.close()
        waiting = set(processes)
        while waiting:
            for pipe in wait(list(waiting)):
                assert isinstance(pipe, Connection)
                try:
                    outcome, value = pipe.recv()
                except EOFError:
                    outcome, value = "failed", "a process ended before its work"
                if outcome == "failed":
                    raise RuntimeError(value)
                if outcome == "done":
                    waiting.remove(pipe)
                else:
                    yield value
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def _job(sender: Connection, function: Any, job: tuple[Any, ...], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches whoever started this, too
    torch.set_num_threads(threads)
    try:
        function(*job, lambda value: sender.send(("sent", value)))
        sender.send(("done", None))
    except BaseException:
        sender.send(("failed", traceback.format_exc()))
