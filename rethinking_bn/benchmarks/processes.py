"""Run one function on several processes of this machine."""

from __future__ import annotations

import datetime
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .equality import ResultsDiffer
from .timing import Plan, Step, alternate

# The server imports everything once and forks a clean process per rank, quicker than starting each.
_CONTEXT: Any = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", __name__])


def run_processes(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    device: torch.device | None = None,
    timeout: float = 240.0,
) -> list[Any]:
    """Call ``function(device, *args)`` on ``world`` processes, each with one thread.

    Args:
        function: defined at the top of a module; returns plain values. The default process group
            is there: nccl on GPUs, gloo on CPUs.
        device: kind of device, "cpu" by default; on GPUs, rank r gets number r.
        timeout: seconds for everything; processes still there then are ended.

    Returns:
        What the ranks returned, rank 0 first.

    Raises:
        ResultsDiffer: when a rank raised it.
        RuntimeError: when a rank raised anything else, with its traceback.
        TimeoutError: when ranks have not answered in time.
    """
    device = torch.device("cpu") if device is None else device
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            target = (sender, function, rank, world, folder, device, timeout, args)
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
    except ResultsDiffer as error:
        sender.send(("differ", f"rank {rank}: {error}"))
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
                raise (ResultsDiffer if outcome == "differ" else RuntimeError)(value)
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def alternate_together(
    sides: Mapping[str, Step], device: torch.device, plan: Plan
) -> dict[str, list[float]]:
    """Time alternatives that all ranks run together; a round lasts as long as its slowest rank.

    Returns:
        name -> seconds per step, one value a round, the same on every rank.
    """

    def agree(mine: tuple[int, int]) -> tuple[int, int]:
        # the least of both: a rank that has nothing to do in some step would choose very many
        everyone = _gather(mine)
        return min(calls for calls, _ in everyone), min(rounds for _, rounds in everyone)

    times = alternate(sides, device, plan, barrier=dist.barrier, agree=agree)
    everyone = _gather(times)
    return {
        name: [max(values) for values in zip(*(times[name] for times in everyone), strict=True)]
        for name in sides
    }


def _gather(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
