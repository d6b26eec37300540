"""From a command line to running processes: arguments, checks, spawning, torchrun."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from rethinking_bn.command_line import argument_parser
from rethinking_bn.engine import ranks
from rethinking_bn.engine.checks import check_run, hold_output_dir
from rethinking_bn.engine.load_config import load_config, use_available_device

Main = Callable[[argparse.Namespace], Any]

_until_the_end = ExitStack()  # what this process holds for as long as it lives


def run(
    main: Main,
    description: str,
    argv: Sequence[str] | None = None,
    *,
    add_options: Callable[[argparse.ArgumentParser], Any] | None = None,
) -> Any:
    """Read and check the command line, then call ``main(args)`` on every rank.

    Ranks are ``--num-gpus`` spawned processes per machine (gloo on the CPU, NCCL on GPUs), or the
    processes that torchrun started. Bad input is one line on stderr and exit status 1, before any
    process is spawned. What ends a run, and how, is said at :mod:`rethinking_bn.engine.ranks`.

    Args:
        main: a module-level function.
        description: for ``--help``.
        argv: default ``sys.argv[1:]``.
        add_options: adds a tool's own options to the parser; ``args`` then holds them.

    Returns:
        what ``main`` returned, if there is one rank only; otherwise None.
    """
    parser = argument_parser(description)
    if add_options is not None:
        add_options(parser)
    args = parser.parse_args(argv)
    try:
        with _silence():
            cfg = check_arguments(args)
    except (ValueError, OSError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(1)
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    if _under_torchrun():
        return _run_under_torchrun(main, args, on_gpu)
    if not on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else detectron2 starts NCCL, for GPUs alone
    if args.num_gpus * args.num_machines > 1:
        ranks.launch(_run_rank, args, main, args, on_gpu)
        return None
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    try:
        return main(args)
    except KeyboardInterrupt:
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
        sys.exit(ranks.INTERRUPTED)


def check_arguments(args: argparse.Namespace) -> CfgNode:
    """Check the command line in the process that will start the others.

    Returns:
        the config, not frozen.

    Raises:
        ValueError, OSError: one line that says what is wrong.
    """
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
    """Return the frozen config on this rank, with logging, seed and output folder set up.

    Raises:
        OSError, RuntimeError: where the run trains and another one does, in this OUTPUT_DIR.
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
    if falls_back:
        logger.warning("No GPU is visible: MODEL.DEVICE is cpu, not cuda.")
    return cfg


@contextmanager
def _silence() -> Iterator[None]:
    """Hold back logs and warnings: what is worth them comes again when the run is set up."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _under_torchrun() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def _run_under_torchrun(main: Main, args: argparse.Namespace, on_gpu: bool) -> Any:
    ranks.end_with(os.getppid())
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method="env://", timeout=DEFAULT_TIMEOUT
    )
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    return _run_rank(main, args, on_gpu)


def _run_rank(main: Main, args: argparse.Namespace, on_gpu: bool) -> Any:
    """Run one rank of several, with its share of the CPU's cores."""
    if not on_gpu and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, (cores or 1) // comm.get_local_size()))
    result = main(args)
    dist.destroy_process_group()
    return result
