"""The processes of a run: started together and ended together, whatever happens to the launcher.

- A launcher that dies, even by SIGKILL, takes its ranks along: each watches it, and a guard does
  for those that are still importing.
- SIGINT (Ctrl-C) to the launcher ends all ranks at once, also where a background shell has set it
  to be ignored. SIGHUP is left as it is: a closed terminal ends the launcher, ``nohup`` prevents
  that.
- SIGTERM is passed on to the ranks, which save and end (:mod:`rethinking_bn.engine.preemption`);
  a second one ends all at once.
- A rank that fails ends all ranks.

A rank leads a process group, which holds its loader workers: those are ended with it.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any, NoReturn

import torch.multiprocessing as mp
from detectron2.engine.launch import DEFAULT_TIMEOUT, _distributed_worker, _find_free_port

from rethinking_bn.engine.preemption import GRACE, PREEMPTED

INTERRUPTED = 130  # exit status, as the shell's for SIGINT

_DEFERRED = {signal.SIGINT, signal.SIGTERM}  # while ranks are being started
_MOMENT = 1.0  # seconds: how often is looked, and how long after a failure for its cause


def end_with(parent: int) -> None:
    """Let this process be killed within seconds once its parent is another than this one.

    Where it leads a process group, all of that is killed.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_MOMENT)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watches the launcher", daemon=True).start()


def launch(function: Callable[..., Any], args: argparse.Namespace, *arguments: Any) -> None:
    """Run ``function(*arguments)`` on the ranks of this machine and wait for their end.

    Args:
        function: of the top level of a module.
        args: the command line; see :func:`rethinking_bn.command_line.argument_parser`.

    Returns when all ranks have ended well; otherwise this process ends on the spot: with status 1
    when a rank failed, whose traceback is printed, 130 after SIGINT, 143 after SIGTERM.
    """
    url = args.dist_url
    if url == "auto":
        url = f"tcp://127.0.0.1:{_find_free_port()}"
    world = args.num_gpus * args.num_machines
    worker = (function, world, args.num_gpus, args.machine_rank, url, arguments, DEFAULT_TIMEOUT)
    ranks = _Ranks(_Guard())
    handlers = {
        signal.SIGINT: signal.signal(signal.SIGINT, ranks.interrupt),
        signal.SIGTERM: signal.signal(signal.SIGTERM, ranks.preempt),
    }
    try:
        resource_tracker.ensure_running()  # which would lift the mask
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _DEFERRED)
        try:
            ranks.start(os.getpid(), *worker)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ranks.join()
    finally:
        ranks.kill()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _run_rank(local_rank: int, launcher: int, *worker: Any) -> None:
    """Run one rank, in its process; what detectron2's launch runs there comes after the signals."""
    os.setpgid(0, 0)  # terminals and schedulers signal the launcher's group: it tells the ranks
    end_with(launcher)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _DEFERRED)  # inherited from it
    _distributed_worker(local_rank, *worker)


class _Guard:
    """A process that waits for the launcher's end, and kills the ranks if that was not orderly."""

    def __init__(self) -> None:
        reading, self._writing = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:  # nothing but system calls from here on
            os.setsid()  # no signal of a terminal reaches it
            os.close(self._writing)
            said = b""
            while chunk := os.read(reading, 4096):
                said += chunk
            for rank in said.split() if not said.endswith(b"done") else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(rank), signal.SIGKILL)
            os._exit(0)
        os.close(reading)

    def watch(self, processes: list[multiprocessing.Process]) -> None:
        os.write(self._writing, b"".join(b"%d " % (process.pid or 0) for process in processes))

    def dismiss(self) -> None:
        """Let it end; all ranks have."""
        os.write(self._writing, b"done")
        os.close(self._writing)
        os.waitpid(self._pid, 0)


class _Ranks:
    """The launcher's side of its ranks."""

    def __init__(self, guard: _Guard) -> None:
        self._guard: _Guard | None = guard
        self._processes: list[multiprocessing.Process] = []
        self._error_files: list[str] = []
        self._deadline: float | None = None

    def start(self, launcher: int, *worker: Any) -> None:
        try:
            context = mp.start_processes(
                _run_rank, (launcher, *worker), nprocs=worker[2], join=False
            )
            self._processes = list(context.processes)
            self._error_files = list(context.error_files)
            if self._guard is not None:
                self._guard.watch(self._processes)
        except BaseException:  # those already started
            self._processes = list(multiprocessing.active_children())  # type: ignore[arg-type]
            raise

    def interrupt(self, *_: Any) -> None:
        """Handle SIGINT."""
        _say("interrupted: all ranks are ended")
        self._end(INTERRUPTED)

    def preempt(self, *_: Any) -> None:
        """Handle SIGTERM: the first is passed on, the second ends all."""
        if self._deadline is not None:
            _say("second SIGTERM: all ranks are ended without a checkpoint")
            self._end(PREEMPTED)
        self._deadline = time.monotonic() + GRACE + _MOMENT  # ranks keep to GRACE by themselves
        for process in self._processes:
            if process.is_alive():
                process.terminate()

    def join(self) -> None:
        """Wait for all; a failed rank, or one that does not end in time, ends this process."""
        running = list(self._processes)
        while running:
            wait([process.sentinel for process in running], timeout=_MOMENT)
            running = [process for process in running if process.exitcode is None]
            ends = [process.exitcode for process in self._processes]
            if any(end not in (None, 0, PREEMPTED) for end in ends):
                if self._deadline is None:
                    self._end(self._report())
                if any((end or 0) > 0 and end != PREEMPTED for end in ends):
                    self._report()  # it failed while it saved
                self._end(PREEMPTED)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._end(PREEMPTED)
        if any(process.exitcode == PREEMPTED for process in self._processes):
            self._end(PREEMPTED)

    def _report(self) -> int:
        """Print what the rank that failed first has to say; return the exit status."""
        wait_until = time.monotonic() + _MOMENT
        for process in self._processes:  # a rank that was killed fails others: which was the first?
            process.join(max(0.0, wait_until - time.monotonic()))
        failed = [
            (rank, process.exitcode)
            for rank, process in enumerate(self._processes)
            if process.exitcode not in (None, 0, PREEMPTED)
        ]
        rank, status = min(failed, key=lambda one: one[1] or 0)  # killed ones first
        if status is not None and status < 0:
            name = signal.Signals(-status).name
            _say(f"error: local rank {rank} was ended by {name}; all others are ended, too")
            return 1
        try:
            with open(self._error_files[rank], "rb") as file:
                print(pickle.load(file), file=sys.stderr)
        except OSError:  # it ended by sys.exit
            pass
        _say(f"error: local rank {rank} failed; all others are ended, too")
        return 1

    def kill(self) -> None:
        """Kill every rank, and what loader workers it has or had."""
        for process in self._processes:
            assert process.pid is not None  # for the type checker
            with contextlib.suppress(ProcessLookupError):  # not a group yet, or no more
                os.killpg(process.pid, signal.SIGKILL)
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join()
        for path in self._error_files:  # what a rank that failed has said
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        if self._guard is not None:
            self._guard.dismiss()
            self._guard = None

    def _end(self, status: int) -> NoReturn:
        """End all ranks and this process, without the seconds that an interpreter's end takes."""
        self.kill()
        sys.stdout.flush()
        os._exit(status)


def _say(text: str) -> None:
    print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr, flush=True)
