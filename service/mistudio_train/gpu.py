"""Which GPUs this machine has and how much of their memory is free, from the driver's own library (NVML).

Imports no torch and holds no CUDA context, so that the parent may ask at any time; a machine without a driver has none.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pynvml

logger = logging.getLogger(__name__)

MIN_MEMORY_BYTES = 4 * 1024**3
"""A GPU with less free memory is not chosen (the seed's)."""
TOTAL_BONUS = 0.1
"""How much a GPU's total memory counts beside its free memory, so that of two free ones the larger is taken."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as it is right now. Memory counts what every process on it uses, not only ours."""

    index: int
    """CUDA index under `CUDA_DEVICE_ORDER=PCI_BUS_ID`, within `CUDA_VISIBLE_DEVICES`."""
    name: str
    compute_capability: str
    """`8.6`; empty where the driver does not say."""
    total_bytes: int
    used_bytes: int
    free_bytes: int
    utilization: float
    """Share of the memory in use, 0 to 1."""

    @property
    def score(self) -> float:
        """Free memory in bytes, with a bonus for a large GPU."""
        return self.free_bytes + TOTAL_BONUS * self.total_bytes

    @property
    def supports_bfloat16(self) -> bool:
        """Whether its tensor cores compute in bfloat16 (compute capability 8.0 and above)."""
        return int(self.compute_capability.partition(".")[0] or 0) >= 8


def list_gpus() -> list[Gpu]:
    """Every visible GPU that answers; none on a machine without a driver. A GPU that fails is logged and left out."""
    try:
        with _nvml():
            return [gpu for index, handle in enumerate(_handles()) if (gpu := _read(index, handle)) is not None]
    except pynvml.NVMLError as error:
        logger.debug("no GPU: %s", error)
        return []


def best_gpu(gpus: Sequence[Gpu], min_bytes: int = MIN_MEMORY_BYTES) -> Gpu | None:
    """The GPU with most free memory, large ones preferred; `None` when none has `min_bytes` free."""
    return max((gpu for gpu in gpus if gpu.free_bytes >= min_bytes), key=lambda gpu: gpu.score, default=None)


@contextmanager
def _nvml() -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _handles() -> Iterator[Any | None]:
    """The handle of each CUDA index; `None` keeps the place of a GPU that does not answer."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(pynvml.nvmlDeviceGetCount())] if visible is None else visible.split(",")
    for name in map(str.strip, names):
        if not name or name.startswith("-"):
            return  # as CUDA does: an invalid entry hides itself and all that follow
        yield _tolerant(partial(_handle, name), f"GPU {name}")


def _handle(name: str) -> Any:
    return pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)


def _read(index: int, handle: Any | None) -> Gpu | None:
    if handle is None:
        return None
    memory = _tolerant(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle), f"memory of GPU {index}")
    if memory is None:
        return None
    capability = _tolerant(lambda: pynvml.nvmlDeviceGetCudaComputeCapability(handle), f"capability of GPU {index}")
    name = _tolerant(lambda: pynvml.nvmlDeviceGetName(handle), f"name of GPU {index}")
    return Gpu(
        index=index,
        name=str(name or "unknown"),
        compute_capability=".".join(map(str, capability)) if isinstance(capability, (tuple, list)) else "",
        total_bytes=int(memory.total),
        used_bytes=int(memory.used),
        free_bytes=int(memory.free),
        utilization=memory.used / memory.total if memory.total else 0.0,
    )


def _tolerant(ask: Callable[[], Any], what: str) -> Any | None:
    try:
        return ask()
    except pynvml.NVMLError as error:
        logger.warning("%s cannot be read: %s", what, error)
        return None
