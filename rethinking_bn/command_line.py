"""What the command lines of detectors share and can do before torch: --help, and ending ranks."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Sequence

from rethinking_bn._detectron2 import INSTALL_GUIDE, detectron2_installed

LAUNCHER = "RETHINKING_BN_LAUNCHER"  # variable: the process id of the launcher, for its ranks

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with(parent: int) -> None:
    """Let the system kill this process when its parent ends, and end it if that has happened.

    On other systems than Linux, only the second.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which torch's own processes get at that moment
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


# A rank that our launcher has spawned: from here on it ends with it, while it imports torch, too.
if LAUNCHER in os.environ:
    end_with(int(os.environ.pop(LAUNCHER)))  # its own child processes are no ranks


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of a tool that runs a detector, with the options of detectron2's own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="a YAML file")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate, without training")
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="GPUs (or processes) per machine"
    )
    parser.add_argument("--num-machines", type=int, default=1, metavar="N", help="machines in all")
    parser.add_argument(
        "--machine-rank", type=int, default=0, metavar="I", help="which of the machines this is"
    )
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="where the machines meet, such as tcp://HOST:PORT; found by itself on a single one",
    )
    add_import(parser)
    parser.add_argument(
        "opts", default=None, nargs=argparse.REMAINDER, help="config keys: KEY VALUE KEY VALUE ..."
    )
    return parser


def add_import(parser: argparse.ArgumentParser) -> None:
    """Add ``--import``: for :func:`rethinking_bn.engine.load_config`, in every process."""
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        dest="imports",
        metavar="MODULE",
        help="import a module first, with data sets or components of your own; may be repeated",
    )


def at_least_one(text: str) -> int:
    """Read an option that counts something: a ``type`` for ``add_argument``."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def require_detectron2(description: str, argv: Sequence[str] | None = None) -> None:
    """End a tool in one line where detectron2 is not installed, unless it is asked for its help.

    To be called before what needs detectron2 is imported; ``description`` is for ``--help``.
    """
    if not detectron2_installed():
        argument_parser(description).parse_known_args(argv)  # ends here for --help
        tool = os.path.basename(sys.argv[0])
        sys.exit(f"{tool}: error: needs detectron2, which is not installed: see {INSTALL_GUIDE}")
