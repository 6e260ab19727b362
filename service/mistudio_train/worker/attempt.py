"""One attempt at a run: corpus, device, child, upload. Raises a `JobError` or returns the event that says it all.

Touches no topic but progress; delivering the event is the supervisor's.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from mistudio_schemas import ArtifactRef, TrainCompleted, TrainRequested
from mistudio_train.errors import DiskFull, RequestRefused
from mistudio_train.messages import ChildMessage, Finished, JobSpec, Lease, Warned
from mistudio_train.settings import Settings

from .artifacts import upload, write_manifest
from .child import Child
from .child_main import Job
from .corpora import fetch_corpus
from .devices import Devices
from .intake import Intake
from .outcome import Who, completed
from .progress import CHILD_SHARE, ProgressFeed
from .register import Claim
from .store import Store
from .workspace import Workspace

logger = logging.getLogger(__name__)

Patiently = Callable[[Callable[[], Any]], Awaitable[Any]]


class Attempt:
    """Everything between "the run is ours" and "this is its result"."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        devices: Devices,
        who: Who,
        claim: Claim,
        intake: Intake,
        feed: ProgressFeed,
        patiently: Patiently,
        job: Job,
    ) -> None:
        self._settings, self._store, self._devices = settings, store, devices
        self._who, self._claim, self._feed, self._patiently, self._job = who, claim, feed, patiently, job
        assert intake.request is not None  # the supervisor has refused it otherwise
        self._request: TrainRequested = intake.request
        self._token = self._hub_token(intake)
        name = f"{claim.record.job_id}-r{claim.record.run}-a{claim.attempt}"
        self._workspace = settings.workspaces / name

    async def run(self) -> TrainCompleted:
        """Do it.

        Raises:
            JobError: if there is no result.

        """
        workspace = await asyncio.to_thread(Workspace, self._workspace)
        try:
            return await self._run()
        except OSError as error:
            if error.errno == 28:
                raise DiskFull("the workspace's disk is full", "Free space below DATA_PATH.") from error
            raise
        finally:
            await asyncio.to_thread(workspace.remove)

    async def _run(self) -> TrainCompleted:
        corpus = await self._fetch_corpus()
        self._feed.say(message="waiting for a device")
        async with self._devices.lease(self._request.gpu_id) as lease:
            finished = await self._train(self._spec(corpus, lease))
        artifacts, manifest = await self._deliver_files()
        warnings, seconds = self._feed.current.warnings, self._claim.record.age_seconds()
        return completed(self._who, finished, artifacts, manifest, warnings=warnings, seconds=seconds)

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
            return await child.result(self._hear)

    def _hear(self, message: ChildMessage) -> None:
        if isinstance(message, Warned):
            logger.warning("job %s: %s", self._who.job_id, message.message)
        self._feed.hear(message)

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


def _device(lease: Lease) -> str:
    return "the CPU" if lease.gpu is None else f"GPU {lease.gpu}"
