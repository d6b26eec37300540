"""From a command line to running processes: arguments, checks, detectron2's launcher, torchrun.

A launcher that dies takes its ranks along, by the system's means (Linux's PR_SET_PDEATHSIG), a rank
that fails ends all ranks, and so does SIGINT to the launcher, also where a background shell ignores
it. SIGTERM is passed on to the ranks, which save and end. docs/training.md has the table.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import HookBase, default_setup
from detectron2.engine import launch as detectron2_launch
from detectron2.engine.hooks import EvalHook
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from rethinking_bn.command_line import LAUNCHER, argument_parser, end_with
from rethinking_bn.engine.check_config import warnings_of
from rethinking_bn.engine.checks import check_run, hold_output_dir
from rethinking_bn.engine.load_config import load_config, use_available_device
from rethinking_bn.engine.rank_state import merge_statistics

logger = logging.getLogger(__name__)

Main = Callable[[argparse.Namespace], Any]

INTERRUPTED, PREEMPTED = 130, 143  # exit statuses, as the shell's for SIGINT and SIGTERM
GRACE = 30.0  # seconds from SIGTERM to the end, with a checkpoint or without
_SAME_SIGNAL = 1.0  # seconds in which a launcher's SIGTERM and a scheduler's count as one

_until_the_end = ExitStack()  # what this process holds for as long as it lives


def run(
    main: Main,
    description: str,
    argv: Sequence[str] | None = None,
    *,
    add_options: Callable[[argparse.ArgumentParser], Any] | None = None,
) -> Any:
    """Read and check the command line, then call ``main(args)`` on every rank.

    Ranks are processes of detectron2's launcher (gloo on the CPU, NCCL on GPUs) or of torchrun. Bad
    input is one line on stderr and exit status 1, before any process is spawned.

    Args:
        main: a module-level function.
        description: for ``--help``.
        argv: default ``sys.argv[1:]``.
        add_options: adds a tool's own options to the parser.

    Returns:
        what ``main`` returned, if there is one rank only; otherwise None.
    """
    parser = argument_parser(description)
    if add_options is not None:
        add_options(parser)
    args = parser.parse_args(argv)
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # what is worth a warning is said when the run is set up
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cfg = check_arguments(args)
    except (ValueError, OSError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            _say(f"error: {error}")
        sys.exit(1)
    finally:
        logging.disable(disabled)
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    if _under_torchrun():
        end_with(os.getppid())
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=DEFAULT_TIMEOUT)
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        return _share_cores(main, args, on_gpu)
    if not on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else detectron2 starts NCCL, for GPUs alone
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    if args.num_gpus * args.num_machines > 1:
        return launch(main, args, on_gpu)
    try:
        return main(args)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(INTERRUPTED)


def check_arguments(args: argparse.Namespace) -> CfgNode:
    """Check the command line before processes start, as :func:`check_run`; return the config."""
    if _under_torchrun():
        local_ranks, ranks = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        if args.num_gpus not in (1, local_ranks) or args.num_machines != 1:
            raise ValueError(
                "torchrun sets the number of processes: leave out --num-gpus and --num-machines"
            )
        return check_run(args, local_ranks, ranks)
    if args.num_gpus < 1 or args.num_machines < 1:
        raise ValueError("--num-gpus and --num-machines must be at least 1")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(f"--machine-rank {args.machine_rank} is not in [0, {args.num_machines})")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ValueError("several machines need the same --dist-url, such as tcp://HOST:PORT")
    return check_run(args, args.num_gpus, args.num_gpus * args.num_machines)


def setup(args: argparse.Namespace) -> CfgNode:
    """Return the frozen config on this rank; set up logging, seed and, as a training's, OUTPUT_DIR.

    Raises:
        OSError, RuntimeError: where another run trains there.
    """
    cfg = load_config(args.config_file, args.opts, imports=args.imports)
    falls_back = use_available_device(cfg)
    cfg.freeze()
    if not args.eval_only:
        _until_the_end.enter_context(hold_output_dir(cfg))
    logger = setup_logger(
        cfg.OUTPUT_DIR, comm.get_rank(), name="rethinking_bn", abbrev_name="rethinking_bn"
    )
    default_setup(cfg, args)
    if comm.is_main_process():
        resumes = args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
        for line in warnings_of(cfg, training=not args.eval_only, resumes=resumes):
            logger.warning("%s", line)
    if falls_back:
        logger.warning("No GPU is visible: MODEL.DEVICE is cpu, not cuda.")
    return cfg


def _under_torchrun() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def launch(main: Main, args: argparse.Namespace, on_gpu: bool) -> None:
    """Run the ranks of this machine; where they do not end well, this process ends on the spot."""
    asked: list[threading.Timer] = []

    def pass_on(*_: Any) -> None:
        """Handle SIGTERM: the first is passed on, the second ends all."""
        if asked:
            _say("second SIGTERM: all ranks are ended without a checkpoint")
            _end(PREEMPTED)
        # a rank that was being started may not have heard it; the others keep to GRACE themselves
        asked.append(_after(GRACE + 1, lambda: _end(PREEMPTED)))
        for rank in multiprocessing.active_children():
            rank.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        places = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
        detectron2_launch(_run_rank, *places, (os.getpid(), main, args, on_gpu))
    except KeyboardInterrupt:
        _say("interrupted: all ranks are ended")
        _end(INTERRUPTED)
    except ProcessExitedException as error:
        if asked or error.exit_code == PREEMPTED:
            _end(PREEMPTED)
        how = f"was ended by {error.signal_name}" if error.signal_name else "failed"
        _say(f"error: local rank {error.error_index} {how}; all others are ended, too")
        _end(1)
    except ProcessRaisedException as error:
        _say(f"error: local rank {error.error_index} failed; all others are ended, too{error}")
        _end(PREEMPTED if asked else 1)
    finally:
        os.environ.pop(LAUNCHER, None)
        signal.signal(signal.SIGTERM, before)
        for timer in asked:
            timer.cancel()


def _run_rank(launcher: int, main: Main, args: argparse.Namespace, on_gpu: bool) -> None:
    """Run one rank, in its process."""
    end_with(launcher)  # again: torch has asked for another signal
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setpgid(0, 0)  # terminals and schedulers signal the launcher's group: it tells the ranks
    _share_cores(main, args, on_gpu)


def _share_cores(main: Main, args: argparse.Namespace, on_gpu: bool) -> Any:
    """Run one rank of several, with its share of the CPU's cores."""
    if not on_gpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // comm.get_local_size()))
    result = main(args)
    dist.destroy_process_group()
    return result


class Preemption(HookBase):
    """Let a SIGTERM to any rank end training on all, in the same iteration, with a checkpoint.

    The checkpoint holds the statistics merged over the ranks, and each rank's own for resuming.
    Evaluation that is due in the iteration is left out. A second SIGTERM ends the process at once,
    and so does the end of 30 seconds.

    State changed: SIGTERM's handler while training. All ranks must have it, after the hooks that
    merge and checkpoint.
    """

    def before_train(self) -> None:
        """Take over SIGTERM."""
        self._asked: float | None = None
        self._handler: Any = None
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._ask) or signal.SIG_DFL

    def after_train(self) -> None:
        """Give SIGTERM back."""
        if self._asked is not None:
            self._timer.cancel()
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)

    def after_step(self) -> None:
        """Save and raise SystemExit with status 143, if all ranks are to stop here."""
        if not any(comm.all_gather(self._asked is not None)):  # so all stop in the same iteration
            return
        ends = self.trainer.iter + 1 >= self.trainer.max_iter
        name = "model_final" if ends else f"model_{self.trainer.iter:07d}"
        if not ends:  # what ends is saved already
            # before merging: each rank goes on with its own
            self.trainer.gather_rank_states()
            merge_statistics(self.trainer.model)
            if comm.is_main_process():
                self.trainer.checkpointer.save(name, iteration=self.trainer.iter)
        logger.warning("SIGTERM: saved as %s.pth; --resume goes on from there.", name)
        comm.synchronize()  # nobody ends before it is saved
        # which runs once more at the end of the last iteration
        self.trainer._hooks[:] = [h for h in self.trainer._hooks if not isinstance(h, EvalHook)]
        sys.exit(PREEMPTED)

    def _ask(self, *_: Any) -> None:
        """Handle SIGTERM; called between two of the process's instructions, so it does little."""
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
            self._timer = _after(GRACE, _end_unsaved)
            return
        # a launcher passes on what the scheduler may also send here
        passes_on = multiprocessing.parent_process() or "TORCHELASTIC_RUN_ID" in os.environ
        if not passes_on or now - self._asked > _SAME_SIGNAL:
            _end_unsaved()


def _end_unsaved() -> None:
    os.write(2, b"SIGTERM: ended without a checkpoint\n")
    os._exit(PREEMPTED)


def _after(seconds: float, end: Callable[[], Any]) -> threading.Timer:
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def _say(text: str) -> None:
    print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr, flush=True)


def _end(status: int) -> NoReturn:
    """End this process and the ranks, without the seconds that an interpreter's end takes."""
    for rank in multiprocessing.active_children():
        with suppress(ProcessLookupError):  # its group, once it has one
            os.killpg(rank.pid, signal.SIGKILL)  # type: ignore[arg-type]
        rank.kill()
    sys.stdout.flush()
    os._exit(status)
