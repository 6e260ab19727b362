"""What figures were taken on."""

import os
import platform

import psutil
import torch


def machine() -> str:
    """Cores are those that this process may use."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    memory, cores = psutil.virtual_memory().total / 1024**3, len(os.sched_getaffinity(0))
    system = f"{platform.system()} {platform.machine()}"
    return f"{gpu}{system}, {cores} cores, {memory:.0f} GiB, Python {platform.python_version()}"
