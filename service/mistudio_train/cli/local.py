"""A job right here: the worker's child and files, with no broker and no store. Imported inside the command only."""

import asyncio
import hashlib
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mistudio_schemas import ArtifactRef, TrainCompleted, TrainFailed, TrainProgress, TrainRequested
from mistudio_train import __version__
from mistudio_train.errors import JobError
from mistudio_train.gpu import list_gpus
from mistudio_train.messages import Failed, Finished, JobSpec, Lease, Logging
from mistudio_train.settings import Settings
from mistudio_train.worker.artifacts import MANIFEST, MEDIA_TYPES, Manifest
from mistudio_train.worker.child import Child, redact
from mistudio_train.worker.child_main import train
from mistudio_train.worker.devices import Devices
from mistudio_train.worker.objects import OCTETS
from mistudio_train.worker.progress import ProgressFeed

Listen = Callable[[TrainProgress], None]
RUN = ATTEMPT = 1


@dataclass(frozen=True)
class LocalJob:
    """What is to be done here."""

    job_id: str
    request: TrainRequested
    corpus: Path
    to: Path
    """The folder of the results, absolute and there."""
    settings: Settings
    model_folders: tuple[Path, ...] = ()
    """Folders that the model may be in, besides the settings'."""
    token: str | None = field(default=None, repr=False)


async def train_here(job: LocalJob, listen: Listen) -> TrainCompleted | TrainFailed:
    """Train and leave the files in `job.to`; on the way out the child and its workspace are gone, whatever happened.

    SIGTERM cancels it, as Ctrl-C does.

    Raises:
        OSError: if the folder cannot be written.

    """
    task = asyncio.current_task()
    assert task is not None  # asyncio.run has made it
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    token = job.token

    async def tell(status: TrainProgress) -> None:
        listen(status)

    feed = ProgressFeed(tell, TrainProgress(**_who(job), status="running", phase="accepting"))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=job.to, prefix=".run-") as workspace:
        try:
            async with Devices(list_gpus, 1, job.settings.cuda_memory_fraction).lease(job.request.gpu_id) as lease:
                last = await _last_word(_spec(job, Path(workspace), lease, token), job.settings, feed)
        except JobError as error:
            last = Failed(error.code, str(error), error.hint, error.retryable, error.traceback)
        if isinstance(last, Failed):
            event: TrainCompleted | TrainFailed = _failed(job, last, feed.current, token)
        else:
            files = await asyncio.to_thread(_deliver, job, Path(workspace) / "output")
            event = _completed(job, last, files, feed.current, time.monotonic() - began)
    await feed.close(phase="ended", status=event.status, message=event.message)
    return event


async def _last_word(spec: JobSpec, settings: Settings, feed: ProgressFeed) -> Finished | Failed:
    async with Child(spec, settings.stall_seconds, settings.loading_stall_seconds, train) as child:
        async for message in child.messages():
            feed.hear(message)
            if isinstance(message, Finished | Failed):
                return message
    raise AssertionError("a child's messages end with its last word, or with an error")


def _spec(job: LocalJob, workspace: Path, lease: Lease, token: str | None) -> JobSpec:
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
        model_folders=(*settings.local_model_folders, *job.model_folders),
        allow_unsafe_models=settings.allow_unsafe_models,
        memory_limit_bytes=settings.memory_limit_bytes,
        token=token,
        logging=settings.logging if chosen else Logging("WARNING", settings.log_format),
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
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ArtifactRef(
        name=name,
        bucket=str(job.to),
        key=name,
        uri=path.as_uri(),
        size=path.stat().st_size,
        sha256=digest,
        media_type=MEDIA_TYPES.get(path.suffix, OCTETS),
    )


def _who(job: LocalJob) -> dict[str, Any]:
    return {"job_id": job.job_id, "run": RUN, "attempt": ATTEMPT, "worker": job.settings.worker_id}


def _failed(job: LocalJob, why: Failed, now: TrainProgress, token: str | None) -> TrainFailed:
    return TrainFailed(
        **_who(job),
        progress=now.progress,
        current_epoch=now.current_epoch,
        current_loss=now.current_loss,
        model_info=now.model_info,
        message=redact(why.message, token),
        code=why.code,
        hint=redact(why.hint, token),
        retryable=why.retryable,
        traceback=[redact(line, token) for line in why.traceback],
        phase=now.phase,
    )


def _completed(
    job: LocalJob, finished: Finished, files: dict[str, ArtifactRef], now: TrainProgress, seconds: float
) -> TrainCompleted:
    primary = finished.saes[0]
    return TrainCompleted(
        **_who(job),
        current_epoch=primary.epochs_trained,
        current_loss=primary.metrics.final_loss,
        estimated_time_remaining=0,
        message=f"{len(finished.saes)} SAE{'s' if len(finished.saes) > 1 else ''} trained",
        model_info=finished.model_info,
        model_path=files["sae_model.pt"].uri,
        activations_path=files["feature_activations.pt"].uri,
        metadata_path=files["metadata.json"].uri,
        training_stats=finished.training_stats,
        feature_count=primary.feature_count,
        ready_for_find_service=True,
        saes=finished.saes,
        corpus=finished.corpus,
        manifest=files[MANIFEST],
        artifacts=[ref for name, ref in files.items() if name != MANIFEST],
        bundle_rows=finished.bundle_rows,
        warnings=now.warnings,
        device=finished.device,
        duration_seconds=seconds,
        memory_peak_bytes=finished.memory_peak_bytes,
        version=__version__,
    )
