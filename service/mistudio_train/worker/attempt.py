"""One attempt at a run: corpus, checkpoint, device, child, upload. Raises a `JobError` or returns a result's event.

Touches no topic but progress; delivering the event is the supervisor's.
"""

import asyncio
import contextlib
import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import SecretStr

from mistudio_schemas import ArtifactRef, TrainCompleted, TrainRequested
from mistudio_train.disk_use import bytes_in
from mistudio_train.errors import ChildDied, DiskFull, DiskLimit, JobError, RequestRefused, StoreUnavailable
from mistudio_train.messages import (
    ChildMessage,
    DatasetFound,
    Finished,
    Identified,
    JobSpec,
    Lease,
    LeftEarly,
    Loaded,
    Logged,
    Saved,
    Warned,
)
from mistudio_train.paces import keep
from mistudio_train.settings import Settings

from .artifacts import upload, write_manifest
from .buckets import is_in_a_bucket
from .checkpoints import CheckpointUploads, restore
from .child import Child
from .child_main import Job
from .corpora import fetch_corpus, is_on_the_hub
from .devices import Devices
from .hub_push import push_of
from .intake import Intake
from .model_cache import HeldModel
from .models import fetch_model
from .orders import Interrupted, Order
from .outcome import completed, reused
from .patience import patiently
from .progress import CHILD_SHARE
from .register import Claim, Register, RunLost
from .reuse import find_result
from .running import Running
from .sinks.feeds import Curves, Sinks
from .starts import fetch_starts
from .store import Store

logger = logging.getLogger(__name__)

SAVING_PHASES = ("extracting", "training")
"""In which a child that is to leave has something to save; in the others the last checkpoint is as good."""
DISK_SECONDS = 2.0
"""Between two looks at what a job takes of the disk."""
LINGER_SECONDS = 5.0
"""That an attempt which is over waits for its thread to leave the store."""
CHILDS_SHARE_OF_GRACE = 0.6
"""Of a leaving worker's time; the rest is for storing what the child has saved."""


class Attempt:
    """Everything between "the run is ours" and "this is its result"."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        register: Register,
        devices: Devices,
        sinks: Sinks,
        running: Running,
        job: Job,
    ) -> None:
        self._settings, self._store, self._register, self._devices = settings, store, register, devices
        self._sinks, self._running, self._job = sinks, running, job
        self._feed, self._workspace, self._claim = running.feed, running.workspace.folder, running.claim
        assert running.intake.request is not None  # the supervisor has refused it otherwise
        self._request: TrainRequested = running.intake.request
        self._token = self._hub_token(running.intake)
        self._push = push_of(self._request, settings)
        self._uploads: CheckpointUploads | None = None
        self._child: Child | None = None
        self._curves: Curves | None = None
        self._earlier: TrainCompleted | None = None
        self._too_large: DiskLimit | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._model: HeldModel | None = None
        self._over, self._storing = False, threading.Lock()

    async def run(self) -> TrainCompleted:
        """Do it.

        Raises:
            JobError: if there is no result.
            RunLost: if another attempt owns the run.
            Interrupted: if an order has ended it.

        """
        try:
            return await self._run()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull("the workspace's disk is full", "Free space below DATA_PATH.") from error
            raise
        finally:
            self._over = True
            if self._model is not None:
                self._model.release()
            for task in self._tasks:
                task.cancel()
            # nothing is to be stored after what comes next, which may be the removal of all that was stored
            await asyncio.to_thread(self._storing.acquire, timeout=LINGER_SECONDS)

    async def _run(self) -> TrainCompleted:
        await asyncio.to_thread(self._running.workspace.hold)
        await asyncio.to_thread(shutil.rmtree, self._workspace / "output", ignore_errors=True)
        corpus = await self._fetch_corpus()
        self._model = await self._fetch_model()
        starts = await self._fetch_starts()
        await self._restore()
        self._feed.say(message="waiting for a device")
        who = self._running.who(self._settings.worker_id)
        async with self._devices.lease(self._request.gpu_id) as lease:
            began = time.monotonic()  # what came before is mostly waiting: for the store, and for a device
            finished = await self._show_and_train(self._spec(corpus, starts, lease))
        if isinstance(finished, TrainCompleted):
            return reused(who, finished, seconds=self._claim.record.age_seconds())
        disk = await asyncio.to_thread(bytes_in, self._workspace)
        artifacts, manifest = await self._deliver_files()
        taken, result = time.monotonic() - began, sum(one.size for one in artifacts)
        await asyncio.to_thread(keep, self._settings.paces, finished.pace, seconds=taken, disk=disk, result=result)
        warnings, seconds = self._feed.current.warnings, self._claim.record.age_seconds()
        return completed(who, finished, artifacts, manifest, warnings=warnings, seconds=seconds)

    async def _fetch_corpus(self) -> Path | None:
        if is_on_the_hub(self._request.corpus_file):
            return None
        self._feed.say(phase="fetching", message=f"fetching the corpus {self._request.corpus_file}")
        where = self._workspace / "corpus"
        return await patiently(lambda: fetch_corpus(self._request.corpus_file, where, self._settings, self._store))

    async def _fetch_model(self) -> HeldModel | None:
        name = self._request.model_name
        if not is_in_a_bucket(name):
            return None
        self._feed.say(phase="fetching", message=f"fetching the model {name}")
        return await patiently(lambda: fetch_model(name, self._settings, self._store, self._leave_if_over))

    async def _fetch_starts(self) -> dict[str, Path]:
        if not (names := self._request.starts):
            return {}
        self._feed.say(phase="fetching", message=f"fetching {', '.join(names)}, to go on from")
        where = self._workspace / "starts"
        return await patiently(lambda: fetch_starts(names, where, self._settings, self._store, self._register))

    def _leave_if_over(self) -> None:
        """In a thread that nobody waits for any more."""
        if self._over:
            raise Interrupted

    async def _restore(self) -> None:
        """An earlier attempt's checkpoints: those of this worker are here, those of another one in the store."""
        if any((self._workspace / "checkpoints").glob("*.json")):
            return
        self._feed.say(message="looking for a checkpoint")
        self._running.checkpoints = await patiently(lambda: restore(self._store, self._claim, self._workspace))
        if found := self._running.checkpoints:
            logger.info("job %s goes on from %s", self._claim.record.job_id, found[0].key)
            self._feed.say(last_checkpoint=self._store.uri(found[0].key))

    async def _show_and_train(self, spec: JobSpec) -> Finished | TrainCompleted:
        """As `_train`, with the curves shown where the settings want them."""
        with self._sinks.following(spec, lambda text: self._hear(Warned(text))) as self._curves:
            return await self._train(spec)

    async def _train(self, spec: JobSpec) -> Finished | TrainCompleted:
        """As `_result_of_child`, but of a run that is cancelled nothing, whatever its child still says."""
        try:
            result = await self._result_of_child(spec)
        except JobError:
            if "cancel" in self._running.orders.given:
                raise Interrupted from None
            raise
        if "cancel" in self._running.orders.given:
            raise Interrupted
        return result

    async def _result_of_child(self, spec: JobSpec) -> Finished | TrainCompleted:
        """What the child has made, or the event of an earlier run that was asked for the same."""
        orders, stalls = self._running.orders, (self._settings.stall_seconds, self._settings.loading_stall_seconds)
        async with Child(spec, *stalls, self._job) as child, self._checkpoint_uploads(child) as uploads:
            self._child, self._uploads = child, uploads
            logger.info("job %s: process %s on %s", spec.job_id, child.pid, _device(spec.lease))
            if spec.workspace_max_bytes is not None:
                self._tasks.append(asyncio.create_task(self._watch_disk(spec.workspace_max_bytes)))
            try:
                with orders.attended(lambda order: self._obey(order, child)):
                    return await child.result(self._hear)
            except (LeftEarly, ChildDied) as error:
                if self._too_large is not None:
                    raise self._too_large from None
                if uploads.lost is not None:
                    raise uploads.lost from None
                if self._earlier is not None and not orders.ending:
                    return self._earlier
                if isinstance(error, ChildDied) and not orders.ending:
                    raise
                if "leave" in orders.given and not await uploads.flush(orders.deadline):
                    logger.warning("job %s: its last checkpoint is not in the store", spec.job_id)
                raise Interrupted from None
            finally:
                self._running.checkpoints = uploads.kept

    def _checkpoint_uploads(self, child: Child) -> CheckpointUploads:
        def on_stored(key: str) -> None:
            self._feed.say(last_checkpoint=self._store.uri(key))

        return CheckpointUploads(
            self._store,
            self._claim,
            self._workspace,
            self._running.checkpoints,
            lambda: self._register.require_ours(self._claim),
            on_stored,
            on_lost=child.kill,
        )

    def _obey(self, order: Order, child: Child) -> None:
        """While the child lives: what it can end better than by being killed, it ends itself."""
        if order == "stop":
            child.ask("stop")
        elif order == "leave" and self._feed.current.phase in SAVING_PHASES:
            child.ask("leave")
            loop = asyncio.get_running_loop()
            loop.call_later((self._running.orders.deadline - loop.time()) * CHILDS_SHARE_OF_GRACE, child.kill)
        else:
            child.kill()

    def _hear(self, message: ChildMessage) -> None:
        match message:
            case Warned():
                logger.warning("job %s: %s", self._claim.record.job_id, message.message)
            case Logged() if self._curves is not None:
                self._curves.hear(message)
            case Saved() if self._uploads is not None:
                self._uploads.hear(message.number)
            case Loaded(commit=str(commit)) if self._claim.record.model_commit is None:
                self._tasks.append(asyncio.create_task(self._keep(self._register.keep_model_commit, commit)))
            case DatasetFound(commit) if self._claim.record.corpus_commit is None:
                self._tasks.append(asyncio.create_task(self._keep(self._register.keep_corpus_commit, commit)))
            case Identified():
                self._running.identity = message.identity
                self._tasks.append(asyncio.create_task(self._look_for_result(message.identity)))
            case _:
                pass
        self._feed.hear(message)

    async def _watch_disk(self, limit: int) -> None:
        """While the child works: one job must not fill the disk that all of them write on."""
        while (taken := await asyncio.to_thread(bytes_in, self._workspace)) <= limit:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(DISK_SECONDS)
        self._too_large = DiskLimit(taken, limit)
        if self._child is not None:
            self._child.kill()

    async def _keep(self, keep: Callable[[Claim, str], Claim], commit: str) -> None:
        """Of the model or a dataset, for the attempts to come; what keeps it from being written shows elsewhere."""
        with contextlib.suppress(RunLost):
            ours = self._running.claim
            self._running.claim = await patiently(lambda: keep(ours, commit))

    async def _look_for_result(self, identity: str) -> None:
        """Before the child has done much: an earlier run may have been asked for the same."""
        with contextlib.suppress(StoreUnavailable):
            self._earlier = await asyncio.to_thread(find_result, self._store, identity)
            if self._earlier is not None and self._child is not None:
                self._child.kill()

    async def _deliver_files(self) -> tuple[list[ArtifactRef], ArtifactRef]:
        self._feed.say(phase="uploading", message="uploading the artifacts", progress=CHILD_SHARE)
        loop = asyncio.get_running_loop()

        def on_progress(done: int, total: int) -> None:
            self._leave_if_over()
            share = CHILD_SHARE + (1 - CHILD_SHARE) * 0.9 * done / max(1, total)
            loop.call_soon_threadsafe(lambda: self._feed.say(progress=share))

        def store() -> tuple[list[ArtifactRef], ArtifactRef]:
            with self._storing:
                artifacts = upload(self._store, self._claim, self._workspace / "output", on_progress)
                return artifacts, write_manifest(self._store, self._claim, artifacts)

        artifacts, manifest = await patiently(store)
        self._feed.say(phase="publishing", message="publishing the result")
        return artifacts, manifest

    def _spec(self, corpus: Path | None, starts: dict[str, Path], lease: Lease) -> JobSpec:
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
            model=self._model.folder if self._model else None,
            starts=starts,
            model_folders=tuple(settings.local_model_folders),
            allow_unsafe_models=settings.allow_unsafe_models,
            workspace_max_bytes=settings.workspace_max_bytes,
            memory_limit_bytes=limit,
            token=self._token.get_secret_value() if self._token else None,
            logging=settings.logging,
            checkpoint_seconds=self._request.checkpoint_seconds or settings.checkpoint_seconds,
            identify=settings.reuse_results and self._push is None,  # an earlier result would not be pushed
            model_commit=self._running.claim.record.model_commit,
            tell_log=bool(settings.sinks),
            corpus_commit=self._running.claim.record.corpus_commit,
            push=self._push,
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
