"""Where the numbers come from: versions, hardware, threads."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    *("torchvision", "detectron2", "fvcore", "numpy"),
    *("scikit-learn", "matplotlib", "pycocotools", "Pillow"),
)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat the numbers; plain values."""
    import rethinking_bn

    affinity = getattr(os, "sched_getaffinity", None)
    described: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "rethinking_bn": rethinking_bn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in _PACKAGES},
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        # Far above 0 before the first measurement, it says that others were using the machine.
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        described["cuda"] = torch.version.cuda
    return described


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
