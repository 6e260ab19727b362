"""One attempt at a run: corpus, device, child, upload. Raises a `JobError` or returns the event that says it all.

Touches no topic but progress; delivering the event is the supervisor's.
"""

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from mistudio_schemas import ArtifactRef, TrainCompleted, TrainRequested
from mistudio_train import __version__
from mistudio_train.errors import ChildFailed, DiskFull, JobError, RequestRefused
from mistudio_train.messages import Failed, Finished, JobSpec, Lease, Warned
from mistudio_train.settings import Settings

from .artifacts import upload, write_manifest
from .child import Child, redact
from .child_main import Job
from .corpora import fetch_corpus
from .devices import Devices
from .intake import Intake
from .progress import CHILD_SHARE, ProgressFeed
from .register import Claim
from .store import Store

logger = logging.getLogger(__name__)

Patiently = Callable[[Callable[[], Any]], Awaitable[Any]]


class Attempt:
    """Everything between "the run is ours" and "this is its result"."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        devices: Devices,
        claim: Claim,
        intake: Intake,
        feed: ProgressFeed,
        patiently: Patiently,
        job: Job,
    ) -> None:
        self._settings, self._store, self._devices = settings, store, devices
        self._claim, self._feed, self._patiently, self._job = claim, feed, patiently, job
        assert intake.request is not None  # the supervisor has refused it otherwise
        self._request: TrainRequested = intake.request
        self._token = self._hub_token(intake)
        name = f"{claim.record.job_id}-r{claim.record.run}-a{claim.attempt}"
        self._workspace = settings.workspaces / name

    async def run(self) -> TrainCompleted:
        """Do it.

        Raises:
            JobError: if there is no result; no secret is in its text.

        """
        try:
            return await self._run()
        except JobError as error:
            raise self._without_token(error) from None
        except OSError as error:
            if error.errno == 28:
                raise DiskFull("the workspace's disk is full", "Free space below DATA_PATH.") from error
            raise
        finally:
            await asyncio.to_thread(shutil.rmtree, self._workspace, ignore_errors=True)

    async def _run(self) -> TrainCompleted:
        await asyncio.to_thread(self._workspace.mkdir, parents=True, exist_ok=True)
        corpus = await self._fetch_corpus()
        self._feed.say(message="waiting for a device")
        async with self._devices.lease(self._request.gpu_id) as lease:
            finished = await self._train(self._spec(corpus, lease))
        artifacts, manifest = await self._deliver_files()
        return self._completed(finished, artifacts, manifest)

    async def _fetch_corpus(self) -> Path:
        self._feed.say(phase="fetching", message=f"fetching the corpus {self._request.corpus_file}")
        where = self._workspace / "corpus"
        path: Path = await self._patiently(
            lambda: fetch_corpus(self._request.corpus_file, where, self._settings, self._store)
        )
        return path

    async def _train(self, spec: JobSpec) -> Finished:
        stalls = self._settings.stall_seconds, self._settings.loading_stall_seconds
        async with Child(spec, *stalls, self._job) as child:
            logger.info("job %s: process %s on %s", spec.job_id, child.pid, _device(spec.lease))
            async for message in child.messages():
                if isinstance(message, Warned):
                    logger.warning("job %s: %s", spec.job_id, message.message)
                self._feed.hear(message)
                if isinstance(message, Failed):
                    raise ChildFailed(
                        message.message,
                        message.hint,
                        message.code,
                        retryable=message.retryable,
                        traceback=message.traceback,
                    )
                if isinstance(message, Finished):
                    return message
        raise AssertionError("a child's messages end with its last word, or with an error")

    async def _deliver_files(self) -> tuple[list[ArtifactRef], ArtifactRef]:
        self._feed.say(phase="uploading", message="uploading the artifacts", progress=CHILD_SHARE)
        loop = asyncio.get_running_loop()

        def on_progress(done: int, total: int) -> None:
            share = CHILD_SHARE + (1 - CHILD_SHARE) * 0.9 * done / max(1, total)
            loop.call_soon_threadsafe(lambda: self._feed.say(progress=share))

        output = self._workspace / "output"
        artifacts = await self._patiently(lambda: upload(self._store, self._claim, output, on_progress))
        manifest = await self._patiently(lambda: write_manifest(self._store, self._claim, artifacts))
        self._feed.say(phase="publishing", message="publishing the result")
        return artifacts, manifest

    def _spec(self, corpus: Path, lease: Lease) -> JobSpec:
        settings, record = self._settings, self._claim.record
        limit = settings.memory_limit_bytes
        return JobSpec(
            job_id=record.job_id,
            run=record.run,
            attempt=self._claim.attempt,
            request=self._request,
            corpus=corpus,
            workspace=self._workspace,
            lease=lease,
            uri_prefix=self._store.uri(self._claim.attempt_prefix),
            bundle_max_bytes=self._request.bundle_max_bytes or settings.bundle_max_bytes,
            model_folders=tuple(settings.local_model_folders),
            allow_unsafe_models=settings.allow_unsafe_models,
            memory_limit_bytes=limit,
            token=self._token.get_secret_value() if self._token else None,
            logging=settings.logging,
        )

    def _completed(self, finished: Finished, artifacts: list[ArtifactRef], manifest: ArtifactRef) -> TrainCompleted:
        by_name = {artifact.name: artifact.uri for artifact in artifacts}
        record, now = self._claim.record, self._feed.current
        primary = finished.saes[0]
        return TrainCompleted(
            job_id=record.job_id,
            run=record.run,
            attempt=self._claim.attempt,
            worker=self._settings.worker_id,
            current_epoch=primary.epochs_trained,
            current_loss=primary.metrics.final_loss,
            estimated_time_remaining=0,
            message=f"{len(finished.saes)} SAE{'s' if len(finished.saes) > 1 else ''} trained",
            model_info=finished.model_info,
            model_path=by_name["sae_model.pt"],
            activations_path=by_name["feature_activations.pt"],
            metadata_path=by_name["metadata.json"],
            training_stats=finished.training_stats,
            feature_count=primary.feature_count,
            ready_for_find_service=True,
            saes=finished.saes,
            corpus=finished.corpus,
            manifest=manifest,
            artifacts=artifacts,
            bundle_rows=finished.bundle_rows,
            warnings=now.warnings,
            device=finished.device,
            duration_seconds=record.age_seconds(),
            memory_peak_bytes=finished.memory_peak_bytes,
            version=__version__,
        )

    def _hub_token(self, intake: Intake) -> SecretStr | None:
        if intake.token is not None:
            return intake.token
        try:
            return self._settings.hub_token(self._request.token_name)
        except KeyError:
            raise RequestRefused(
                f"this worker holds no token named {self._request.token_name}",
                "Ask the operator to set HF_TOKEN_<NAME>, or leave token_name out.",
            ) from None

    def _without_token(self, error: JobError) -> JobError:
        secret = self._token.get_secret_value() if self._token else None
        return ChildFailed(
            redact(str(error), secret),
            redact(error.hint, secret),
            error.code,
            retryable=error.retryable,
            traceback=[redact(line, secret) for line in error.traceback],
        )


def _device(lease: Lease) -> str:
    return "the CPU" if lease.gpu is None else f"GPU {lease.gpu}"
