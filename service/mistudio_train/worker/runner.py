"""A run's way to its end: attempt after attempt, with what came of it. Touches no topic but progress.

Delivering the end is the supervisor's; what one attempt does, `Attempt` knows.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from traceback import format_exception

from mistudio_schemas import TrainProgress
from mistudio_train.errors import ChildDied, JobError, StoreUnavailable
from mistudio_train.settings import Settings

from .attempt import Attempt
from .backoff import BACKOFF_SECONDS
from .child_main import Job, train
from .controls import Controls
from .delivery import PartitionLost
from .devices import Devices
from .intake import Intake, Message
from .metrics import Metrics
from .obedience import Obedience
from .orders import Interrupted, Orders
from .outcome import cancelled, failed, last_status
from .patience import patiently
from .progress import ProgressFeed
from .register import Claim, Register, RunLost
from .run_record import Terminal, new_name
from .running import Running
from .sinks.feeds import Sinks
from .store import Store
from .workspace import Workspace

logger = logging.getLogger(__name__)

GIVE_BACK_SECONDS = 5.0


class Runner:
    """Takes runs that are this worker's to their ends.

    Args:
        publish_progress: sends a progress event.
        speaks_for: whether it is this worker, of all, that speaks for a job that none has begun; told the partitions
            of the requests' topic.
        sinks: where curves are shown.
        job: what a child does.

    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        devices: Devices,
        sinks: Sinks,
        metrics: Metrics,
        publish_progress: Callable[[TrainProgress], Awaitable[None]],
        speaks_for: Callable[[str, list[int]], bool],
        job: Job = train,
    ) -> None:
        self._settings, self._store, self._devices, self._metrics = settings, store, devices, metrics
        self._sinks = sinks
        self._register, self._publish_progress, self._job = Register(store), publish_progress, job
        self._obedience = Obedience(settings, self._register, publish_progress, speaks_for)

    @property
    def controls(self) -> Controls:
        """What jobs are told from outside; to be followed while the worker runs."""
        return self._obedience.controls

    def take_on(self, claim: Claim, message: Message, intake: Intake, orders: Orders) -> Running:
        """Have the run under way."""
        record = claim.record
        logger.info("job %s run %d attempt %d begins", record.job_id, record.run, claim.attempt)
        folder = self._settings.workspaces / f"{record.job_id}-r{record.run}-a{claim.attempt}"
        silence = self._settings.kafka_session_timeout_ms / 2000
        first = self._first_event(claim, intake)
        feed = ProgressFeed(self._publish_progress, first, lambda: self._is_ours(running), silence)
        running = Running(message, intake, claim, feed, orders, Workspace(folder))
        return running

    async def tell_end(self, end: Terminal) -> None:
        """The last word on a run whose worker came to its end and died before it said so."""
        try:
            await self._publish_progress(last_status(end))
        except Exception as error:
            logger.warning("progress of %s was not published: %s", end.job_id, type(error).__name__)

    async def end_of(self, running: Running) -> Terminal:
        """How the run ends; its workspace is gone then.

        Raises:
            RunLost: if another worker has it.
            Interrupted: if this worker leaves, and another one will end it.

        """
        self._obedience.running.add(running)
        try:
            with self._metrics.running.track_inprogress():
                return await self._obedient_end_of(running)
        except (asyncio.CancelledError, Interrupted):
            await asyncio.shield(self._give_back(running))
            raise
        finally:
            self._obedience.running.discard(running)
            await asyncio.to_thread(running.workspace.remove)

    async def _obedient_end_of(self, running: Running) -> Terminal:
        try:
            await self._obedience.heed(running)
            return await running.orders.interruptible(self._attempts(running))
        except Interrupted:
            if "leave" in running.orders.given:
                raise
            return self._cancelled(running)

    async def _attempts(self, running: Running) -> Terminal:
        """Try until there is a result, an error that trying again does not mend, or no attempt left."""
        while True:
            try:
                if running.intake.request is None:
                    raise running.intake.refusal or JobError("no request", "This is a defect of the worker.")
                self._require_attempts(running.claim)
                return await self._attempt(running).run()
            except (RunLost, PartitionLost, Interrupted):
                raise
            except Exception as unexpected:
                error = _as_job_error(unexpected)
                running.claim = await self._failed_attempt(running.claim, error)
                tried = running.claim.failed_attempts
                if not error.retryable or tried >= self._settings.max_attempts:
                    return failed(running.who(self._settings.worker_id), error, running.feed.current, tried)
                delay = BACKOFF_SECONDS[min(tried - 1, len(BACKOFF_SECONDS) - 1)]
                logger.warning("job %s: %s; attempt %d in %.0f s", running.intake.job_id, error, tried + 1, delay)
                running.feed.say(message=f"{error}; tried again in {delay:.0f} s")
                await asyncio.sleep(delay)
                async with running.heeding:  # a control that is being obeyed was noted by the present owner
                    running.claim = await self._next_attempt(running.claim)
                running.feed.begin_again(running.claim.attempt)

    def _require_attempts(self, claim: Claim) -> None:
        """Refuse one more try of a run whose workers died, as often as it may fail: it may well have killed them."""
        if (lost := claim.failed_attempts) >= self._settings.max_attempts:
            raise ChildDied(
                f"the run was given up after {lost} attempts: the worker itself died in the last one",
                "Look at that worker's end (out of memory?); ask for less memory, or raise MAX_ATTEMPTS.",
            )

    async def _give_back(self, running: Running) -> None:
        """Note that this attempt was stopped in good order, so that it counts as no failure; if it can be done soon."""
        why = "the worker was stopped, or lost the run"
        try:
            async with asyncio.timeout(GIVE_BACK_SECONDS):
                await asyncio.to_thread(self._register.attempt_stopped, running.claim, why)
        except (RunLost, StoreUnavailable, TimeoutError) as error:
            logger.info("job %s: its register does not say 'stopped': %s", running.intake.job_id, error)

    def _cancelled(self, running: Running) -> Terminal:
        controls = running.claim.record.controls
        last = next((one for one in controls if one.action == "cancel"), controls[-1] if controls else None)
        by = last.requested_by if last else None
        if last is not None and last.action == "stop":
            message = "stopped before anything was trained: there is nothing to deliver"
        else:
            message = f"cancelled by {by or 'somebody'}"
        return cancelled(running.who(self._settings.worker_id), running.feed.current, by, message)

    def _attempt(self, running: Running) -> Attempt:
        outside = self._settings, self._store, self._register, self._devices, self._sinks
        return Attempt(*outside, running, self._job)

    async def _failed_attempt(self, claim: Claim, error: JobError) -> Claim:
        return await patiently(lambda: self._register.attempt_failed(claim, error.code, str(error)))

    async def _next_attempt(self, claim: Claim) -> Claim:
        owner = new_name()
        return await patiently(lambda: self._register.try_again(claim, self._settings.worker_id, owner))

    def _first_event(self, claim: Claim, intake: Intake) -> TrainProgress:
        return TrainProgress(
            job_id=intake.job_id,
            run=claim.record.run,
            attempt=claim.attempt,
            worker=self._settings.worker_id,
            status="running",
            phase="accepting",
            message="a worker has taken the job",
            unknown_fields=intake.unknown,
        )

    async def _is_ours(self, running: Running) -> bool:
        try:
            await asyncio.to_thread(self._register.require_ours, running.claim)
        except (RunLost, StoreUnavailable) as error:
            logger.info("job %s: nothing is said of it: %s", running.intake.job_id, error)
            return False
        return True


def _as_job_error(error: Exception) -> JobError:
    """A defect of ours ends the job with a traceback, never the worker."""
    if isinstance(error, JobError):
        return error
    logger.exception("unexpected")
    lines = "".join(format_exception(error)).splitlines()[-20:]
    hint = "This is a defect of the worker; the traceback says where."
    return JobError(f"{type(error).__name__} in the worker", hint, traceback=lines)
