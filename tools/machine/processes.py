"""Run one function on several processes of this machine: together, as ranks, or side by side."""

from __future__ import annotations

import datetime
import io
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# The server imports everything once and forks a clean process per rank: quicker than starting each,
# and without the threads and locks that a fork of this process would inherit.
_CONTEXT: Any = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch.distributed", "rethinking_bn.layers"])
_GRACE = 30.0  # seconds that the others have to fail, too, once a rank has failed


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
        function: defined at the top of a module. The default process group is there: nccl on GPUs,
            gloo on CPUs. What it returns can be pickled; tensors arrive as copies.
        device: kind of device, "cpu" by default; on GPUs, rank r gets number r.
        timeout: seconds for everything; processes still there then are ended.
        expected: an exception that is an answer too: raised here with its message, when a rank did.

    Returns:
        What the ranks returned, rank 0 first.

    Raises:
        RuntimeError: when ranks raised anything not expected, with their tracebacks.
        TimeoutError: when ranks have not answered in time.
    """
    device = torch.device("cpu") if device is None else device
    with tempfile.TemporaryDirectory() as folder:
        common = (function, world, folder, device, timeout, expected, args)
        with _started(_rank, [(rank, *common) for rank in range(world)]) as pipes:
            return _collect(pipes, timeout)


@contextmanager
def _started(
    target: Callable[..., None], arguments: Sequence[tuple[Any, ...]]
) -> Generator[list[Connection], None, None]:
    """Start a process for each tuple of arguments; those that are left at the end are killed."""
    pipes: list[Connection] = []
    processes: list[Any] = []
    done = False
    try:
        for each in arguments:
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(target=target, args=(sender, *each), daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        yield pipes
        done = True
    finally:
        for process in processes:
            process.join(timeout=10 if done else 0)
            if process.is_alive():
                process.kill()
                process.join()


def _rank(
    sender: Connection,
    rank: int,
    function: Callable[..., Any],
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
        # Tensors sent as they are would be shared memory that dies with this process.
        buffer = io.BytesIO()
        torch.save(function(device, *args), buffer)
        sender.send(("done", buffer.getvalue()))
    except expected as error:
        sender.send(("expected", type(error)(f"rank {rank}: {error}")))
    except BaseException:
        sender.send(("failed", traceback.format_exc()))
    finally:
        sender.close()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    answers: dict[int, tuple[str, Any]] = {}
    while len(answers) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
        ready = wait(waiting, timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                answer = pipe.recv()
            except EOFError:
                answer = ("failed", "the process ended without an answer")
            answers[pipes.index(pipe)] = answer
            if answer[0] != "done":
                deadline = min(deadline, time.monotonic() + _GRACE)
    for outcome, value in answers.values():
        if outcome == "expected":
            raise value
    late = [rank for rank in range(len(pipes)) if rank not in answers]
    said = [f"rank {rank}:\n{text}" for rank, (kind, text) in answers.items() if kind == "failed"]
    missing = f"ranks {late} have not answered in time"
    if said:
        raise RuntimeError("\n".join([*said, missing] if late else said))
    if late:
        raise TimeoutError(missing)
    loaded = (io.BytesIO(answers[rank][1]) for rank in range(len(pipes)))
    return [torch.load(buffer, weights_only=False) for buffer in loaded]


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
    each = max(1, threads // len(jobs))
    with _started(_job, [(function, job, each) for job in jobs]) as waiting:
        waiting = list(waiting)
        while waiting:
            for pipe in wait(waiting):
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


def _job(sender: Connection, function: Any, job: tuple[Any, ...], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches whoever started this, too
    torch.set_num_threads(threads)
    try:
        function(*job, lambda value: sender.send(("sent", value)))
        sender.send(("done", None))
    except BaseException:
        sender.send(("failed", traceback.format_exc()))
