"""Where the numbers come from: versions, hardware, threads."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rethinking_bn import __version__

_PACKAGES = ("torchvision", "detectron2", "fvcore", "numpy")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat the numbers; plain values."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "rethinking_bn": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in _PACKAGES},
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        # Far above 0 before the first measurement, it says that others were using the machine.
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "device": str(device),
        **(_describe_gpu(device) if device.type == "cuda" else {}),
    }


def available_cores() -> int:
    """Return the number of CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _describe_gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
