"""What figures were taken on."""

import os
import platform

import psutil


def machine() -> str:
    """Cores are those that this process may use."""
    memory, cores = psutil.virtual_memory().total / 1024**3, len(os.sched_getaffinity(0))
    return (
        f"{platform.system()} {platform.machine()}, {cores} cores, {memory:.0f} GiB, Python {platform.python_version()}"
    )
