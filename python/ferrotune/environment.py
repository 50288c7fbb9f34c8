"""Where a run was made: versions, system and processor, for its results and its report."""

import importlib.metadata
import os
import platform
from pathlib import Path

from .version import version

_PACKAGES = ("numpy", "torch", "transformers", "peft", "bitsandbytes")


def describe() -> dict[str, str]:
    """Names and values, in the order in which they are shown; packages that are there alone."""
    found = {
        "ferrotune": version(),
        "Python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": str(_cores()),
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
