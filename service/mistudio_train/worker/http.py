"""The worker's HTTP port: is it alive, is it ready, what are its GPUs and metrics. Reads state, changes none."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from faststream.asgi import AsgiResponse, get
from faststream.asgi.response import JSONResponse
from prometheus_client import generate_latest

from mistudio_train import SERVICE, __version__
from mistudio_train.gpu import Gpu

from .metrics import Metrics
from .slots import Slot
from .store import Store

STORE_SECONDS = 3.0


def routes(
    store: Store, slots: Sequence[Slot], metrics: Metrics, gpus: Callable[[], Sequence[Gpu]]
) -> list[tuple[str, Any]]:
    """Path and handler of every page."""
    probe = _Probe(store)

    @get
    async def live(scope: Any) -> AsgiResponse:
        """The process runs its event loop."""
        return AsgiResponse(b"alive\n", 200)

    @get
    async def ready(scope: Any) -> AsgiResponse:
        """Every slot has its partitions, and the store answers."""
        report = await _readiness(probe, slots)
        return JSONResponse(report, 200 if report["ready"] else 503)

    @get
    async def health(scope: Any) -> AsgiResponse:
        """The seed's health report: service, GPUs, readiness."""
        devices = [asdict(gpu) for gpu in await asyncio.to_thread(gpus)]
        report = await _readiness(probe, slots)
        return JSONResponse({"service": SERVICE, "version": __version__, "gpus": devices} | report)

    @get
    async def gpu_status(scope: Any) -> AsgiResponse:
        """Memory of every GPU, other processes' included."""
        devices = [asdict(gpu) for gpu in await asyncio.to_thread(gpus)]
        return JSONResponse({"cuda_available": bool(devices), "gpu_count": len(devices), "gpus": devices})

    @get
    async def numbers(scope: Any) -> AsgiResponse:
        """Prometheus metrics."""
        kind = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return AsgiResponse(generate_latest(metrics.registry), 200, kind)

    return [
        ("/live", live),
        ("/ready", ready),
        ("/health", health),
        ("/gpu/status", gpu_status),
        ("/metrics", numbers),
    ]


class _Probe:
    """Asks whether the store answers, one question at a time: one that hangs keeps its thread for minutes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._asked: asyncio.Task[None] | None = None

    async def answers(self) -> bool:
        """Whether it does so within some seconds."""
        if self._asked is None or self._asked.done():
            self._asked = asyncio.create_task(asyncio.to_thread(self._store.ensure))
        done, _ = await asyncio.wait([self._asked], timeout=STORE_SECONDS)
        return bool(done) and self._asked.exception() is None


async def _readiness(probe: _Probe, slots: Sequence[Slot]) -> dict[str, Any]:
    joined = all(slot.assigned is not None for slot in slots)
    reachable = await probe.answers()
    partitions = sum(len(slot.assigned or ()) for slot in slots)
    return {"ready": joined and reachable, "in_group": joined, "partitions": partitions, "store": reachable}
