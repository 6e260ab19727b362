"""How the C library keeps memory: for a training step, otherwise than for everything else."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Of `mallopt`."""
LARGEST_INT: Final = 2**31 - 1
MIB: Final = 1024**2
USUAL: Final = {M_MMAP_MAX: 65_536, M_MMAP_THRESHOLD: 32 * MIB, M_TRIM_THRESHOLD: 64 * MIB}
"""What the library comes to by itself in a process that has freed a large block."""
KEPT: Final = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: LARGEST_INT}


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep large freed blocks for the next ones of their size, where the GNU library would give them back.

    It asks the system for every block of 32 MiB and more anew, whose pages then come one fault at a time: a training
    step with matrices of that size took up to half as long again (`benchmarks/step.py`).
    """
    _set(KEPT)
    try:
        yield
    finally:
        _set(USUAL)
        give_back()


def give_back() -> None:
    """Give the system what is free: an allocator keeps it, in pieces that the next step's blocks may not fit into."""
    if trim := _function("malloc_trim"):
        trim(0)


def _set(options: dict[int, int]) -> None:
    if mallopt := _function("mallopt"):
        for option, value in options.items():
            mallopt(option, value)


def _function(name: str) -> Any:
    """Of the GNU library; `None` where there is another one."""
    return getattr(ctypes.CDLL(None), name, None)
