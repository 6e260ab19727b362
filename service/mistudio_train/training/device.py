"""The device that a lease gives a job, and how much of its memory is free right now. Imports no torch."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from mistudio_train.errors import GpuUnavailable
from mistudio_train.gpu import Gpu, list_gpus
from mistudio_train.messages import Lease

OVERHEAD_GPU: Final = 700 * 1024**2
"""CUDA context, kernels and the allocator's slack."""
OVERHEAD_CPU: Final = 830 * 1024**2
"""The libraries of the process itself, with their threads, as measured (`benchmarks/planned.py`)."""
CGROUP_FILES: Final = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
"""Limit, use and statistics of a container's memory, in both versions of the interface."""


@dataclass(frozen=True)
class Device:
    """What a lease gives."""

    name: str
    available_bytes: int
    gpu: Gpu | None = None

    @property
    def overhead(self) -> int:
        """Bytes that are taken before any tensor is made."""
        return OVERHEAD_GPU if self.gpu else OVERHEAD_CPU


def leased_device(lease: Lease, memory_limit_bytes: int | None = None) -> Device:
    """What the lease gives right now.

    Raises:
        GpuUnavailable: if its GPU does not answer.

    """
    if lease.gpu is None:
        return Device("cpu", int(free_memory(memory_limit_bytes) * lease.memory_share))
    gpu = next((gpu for gpu in list_gpus() if gpu.index == lease.gpu), None)
    if gpu is None:
        raise GpuUnavailable(f"GPU {lease.gpu} does not answer", "Ask the worker's operator to look at it.")
    return Device(f"cuda:{lease.gpu}", int(gpu.free_bytes * lease.memory_share), gpu)


def threads_of(lease: Lease) -> int:
    """Threads of arithmetic: the job's share of the cores, so that jobs side by side do not wait for each other."""
    cores = len(os.sched_getaffinity(0))
    return max(1, int(cores * lease.memory_share)) if lease.gpu is None else cores


def device_name(device: Device, lease: Lease) -> str:
    """What makes a job as fast as it is there."""
    if device.gpu is not None:
        return device.gpu.name
    threads = threads_of(lease)
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}"


def free_memory(limit: int | None = None, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that this process may still use: the machine's, its container's, and the operator's limit."""
    bounds = [psutil.virtual_memory().available]
    if limit is not None:
        bounds.append(limit)
    for maximum, current, statistics in CGROUP_FILES:
        allowed, used = _number_in(cgroup / maximum), _number_in(cgroup / current)
        if allowed is not None and used is not None:
            bounds.append(max(0, allowed - max(0, used - _droppable(cgroup / statistics))))
    return min(bounds)


def _number_in(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _droppable(path: Path) -> int:
    """Bytes of files that the container holds in memory and can drop at once."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.split()[0] in ("inactive_file", "total_inactive_file"))
