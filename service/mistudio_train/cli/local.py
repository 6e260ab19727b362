"""A job right here: the worker's child and files, with no broker and no store. Imported inside the command only."""

import asyncio
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from mistudio_schemas import ArtifactRef, TrainCompleted, TrainFailed, TrainProgress, TrainRequested
from mistudio_train.digest import sha256_of
from mistudio_train.disk_use import bytes_in
from mistudio_train.errors import JobError
from mistudio_train.gpu import list_gpus
from mistudio_train.messages import ChildMessage, Finished, JobSpec, Lease, Logged, Logging, Warned
from mistudio_train.paces import keep
from mistudio_train.settings import Settings
from mistudio_train.worker.artifacts import MANIFEST, MEDIA_TYPES, Manifest
from mistudio_train.worker.child import Child
from mistudio_train.worker.child_main import train
from mistudio_train.worker.devices import Devices
from mistudio_train.worker.hub_push import push_of
from mistudio_train.worker.objects import OCTETS
from mistudio_train.worker.outcome import Who, completed, failed
from mistudio_train.worker.progress import ProgressFeed
from mistudio_train.worker.sinks.feeds import Sinks

Listen = Callable[[TrainProgress], None]
RUN = ATTEMPT = 1


@dataclass(frozen=True)
class LocalJob:
    """What is to be done here."""

    job_id: str
    request: TrainRequested
    corpus: Path | None
    """`None`: a dataset of the hub."""
    to: Path
    """The folder of the results, absolute and there."""
    settings: Settings
    model_folders: tuple[Path, ...] = ()
    """Folders that the model may be in, besides the settings'."""
    starts: Mapping[str, Path] = field(default_factory=dict)
    """Folders of the SAEs to go on from, as the request names them."""
    token: str | None = field(default=None, repr=False)


async def train_here(job: LocalJob, listen: Listen, sinks: Sinks) -> TrainCompleted | TrainFailed:
    """Train and leave the files in `job.to`; on the way out the child and its workspace are gone, whatever happened.

    SIGTERM cancels it, as Ctrl-C does. Sinks have SINK_CLOSE_SECONDS at the end.

    Raises:
        OSError: if the folder cannot be written.

    """
    task = asyncio.current_task()
    assert task is not None  # asyncio.run has made it
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await _train(job, listen, sinks)
    finally:
        await sinks.close(job.settings.sink_close_seconds)


async def _train(job: LocalJob, listen: Listen, sinks: Sinks) -> TrainCompleted | TrainFailed:
    async def tell(status: TrainProgress) -> None:
        listen(status)

    who = Who(job.job_id, RUN, ATTEMPT, job.settings.worker_id)
    feed = ProgressFeed(tell, TrainProgress(**vars(who), status="running", phase="accepting"))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=job.to, prefix=".run-") as workspace:
        try:
            async with Devices(list_gpus, 1, job.settings.cuda_memory_fraction).lease(job.request.gpu_id) as lease:
                finished = await _finished(job.settings, _spec(job, Path(workspace), lease), feed, sinks)
                disk = await asyncio.to_thread(bytes_in, Path(workspace))
                files = await asyncio.to_thread(_deliver, job, Path(workspace) / "output")
            manifest = files.pop(MANIFEST)
            seconds, result = time.monotonic() - began, sum(one.size for one in files.values())
            keep(job.settings.paces, finished.pace, seconds=seconds, disk=disk, result=result)
            event: TrainCompleted | TrainFailed = completed(
                who, finished, list(files.values()), manifest, warnings=feed.current.warnings, seconds=seconds
            )
        except JobError as error:
            event = failed(who, error, feed.current, attempts=1)
    await feed.close(phase="ended", status=event.status, message=event.message)
    return event


async def _finished(settings: Settings, spec: JobSpec, feed: ProgressFeed, sinks: Sinks) -> Finished:
    with sinks.following(spec, lambda text: feed.hear(Warned(text))) as curves:

        def hear(message: ChildMessage) -> None:
            if isinstance(message, Logged):
                curves.hear(message)
            feed.hear(message)

        async with Child(spec, settings.stall_seconds, settings.loading_stall_seconds, train) as child:
            return await child.result(hear)


def _spec(job: LocalJob, workspace: Path, lease: Lease) -> JobSpec:
    settings = job.settings
    chosen = "log_level" in settings.model_fields_set
    return JobSpec(
        job_id=job.job_id,
        run=RUN,
        attempt=ATTEMPT,
        request=job.request,
        corpus=job.corpus,
        workspace=workspace,
        lease=lease,
        uri_prefix=f"{job.to.as_uri()}/",
        bundle_max_bytes=job.request.bundle_max_bytes or settings.bundle_max_bytes,
        starts=job.starts,
        model_folders=(*settings.local_model_folders, *job.model_folders),
        allow_unsafe_models=settings.allow_unsafe_models,
        memory_limit_bytes=settings.memory_limit_bytes,
        token=job.token,
        logging=settings.logging if chosen else Logging("WARNING", settings.log_format),
        tell_log=bool(settings.sinks),
        push=push_of(job.request, settings),
    )


def _deliver(job: LocalJob, output: Path) -> dict[str, ArtifactRef]:
    """Move the child's files into place, the manifest last: where it stands, all of them stand."""
    (job.to / MANIFEST).unlink(missing_ok=True)
    refs = {}
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        name = path.relative_to(output).as_posix()
        (job.to / name).parent.mkdir(parents=True, exist_ok=True)
        refs[name] = _ref(job, name, path.replace(job.to / name))
    manifest = Manifest(
        job_id=job.job_id, run=RUN, attempt=ATTEMPT, created=datetime.now(UTC), objects=list(refs.values())
    )
    aside = output / MANIFEST
    aside.write_bytes(manifest.to_json())
    aside.replace(job.to / MANIFEST)
    return refs | {MANIFEST: _ref(job, MANIFEST, job.to / MANIFEST)}


def _ref(job: LocalJob, name: str, path: Path) -> ArtifactRef:
    return ArtifactRef(
        name=name,
        bucket=str(job.to),
        key=name,
        uri=path.as_uri(),
        size=path.stat().st_size,
        sha256=sha256_of(path),
        media_type=MEDIA_TYPES.get(path.suffix, OCTETS),
    )
