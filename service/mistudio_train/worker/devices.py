"""Which slot may use which device: leases, so that two jobs never plan the same memory. Imports no torch."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from mistudio_train.errors import GpuUnavailable
from mistudio_train.gpu import Gpu
from mistudio_train.messages import Lease


class Devices:
    """The worker's GPUs, or its CPU, shared out among the slots.

    With more slots than GPUs several jobs share one, and each may plan only its stated share of the free memory.
    """

    def __init__(self, gpus: Callable[[], Sequence[Gpu]], slots: int, cuda_memory_fraction: float) -> None:
        self._gpus, self._slots, self._fraction = gpus, slots, cuda_memory_fraction
        self._leases: Counter[int] = Counter()
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def lease(self, wanted: int | None) -> AsyncIterator[Lease]:
        """A device for one job, as soon as one has room.

        Args:
            wanted: the GPU that the request names; ignored on a machine without any, as the CPU stands in there.

        Raises:
            GpuUnavailable: if this worker has GPUs, and that is none of them.

        """
        gpus = await asyncio.to_thread(self._gpus)
        if not gpus:
            yield Lease(gpu=None, memory_share=1 / self._slots)
            return
        indices = [gpu.index for gpu in gpus]
        if wanted is not None and wanted not in indices:
            raise GpuUnavailable(
                f"GPU {wanted} is asked for, this worker has {', '.join(map(str, indices))}",
                "Leave gpu_id out, or name one of these.",
            )
        room = -(-self._slots // len(gpus))
        async with self._changed:
            await self._changed.wait_for(lambda: self._best(gpus, wanted, room) is not None)
            index = self._best(gpus, wanted, room)
            assert index is not None  # wait_for has just seen it
            self._leases[index] += 1
        try:
            yield Lease(gpu=index, memory_share=self._fraction / room)
        finally:
            async with self._changed:
                self._leases[index] -= 1
                self._changed.notify_all()

    def _best(self, gpus: Sequence[Gpu], wanted: int | None, room: int) -> int | None:
        """The least leased GPU with room; of those the one with most free memory, large ones preferred (the seed's)."""
        free = [gpu for gpu in gpus if wanted in (None, gpu.index) and self._leases[gpu.index] < room]
        best = max(free, key=lambda gpu: (-self._leases[gpu.index], gpu.score), default=None)
        return None if best is None else best.index
