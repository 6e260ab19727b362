"""One job as the worker's own child does it, in a new process, with neither a broker nor a store. Measures nothing."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mistudio_schemas import TrainRequested
from mistudio_train.messages import ChildMessage, Finished, JobSpec, Lease, Logging
from mistudio_train.worker.child import Child

STALL_SECONDS: Final = 600.0
BUNDLE_BYTES: Final = 8 * 1024**3


def spec_of(request: TrainRequested, corpus: Path, workspace: Path, *, memory_share: float = 1.0) -> JobSpec:
    """The job of a request on a model in a folder."""
    return JobSpec(
        job_id="benchmark",
        run=1,
        attempt=1,
        request=request,
        corpus=corpus,
        workspace=workspace,
        lease=Lease(None, memory_share),
        uri_prefix=f"{workspace.as_uri()}/",
        bundle_max_bytes=BUNDLE_BYTES,
        model_folders=(Path(request.model_name).parent,),
        logging=Logging("WARNING"),
    )


def child_of(spec: JobSpec) -> Child:
    """Its child, not yet started."""
    return Child(spec, STALL_SECONDS, STALL_SECONDS)


def done(spec: JobSpec, hear: Callable[[ChildMessage], None] = lambda message: None) -> Finished:
    """Wait for it, and hear what it says on the way.

    Raises:
        ChildFailed: if it says why it cannot go on.
    """

    async def result() -> Finished:
        async with child_of(spec) as child:
            return await child.result(hear)

    return asyncio.run(result())
