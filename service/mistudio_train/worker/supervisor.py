"""One message's way through the worker: read it, claim its run, let a child do the work, deliver its end.

The order of the steps is the guarantee; docs/architecture.md draws it. Owns no client: store, register, devices and
the progress topic are given.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from traceback import format_exception

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from mistudio_schemas import KafkaRecord, TrainCompleted, TrainProgress, record_for
from mistudio_train.errors import ChildDied, JobError, StoreUnavailable
from mistudio_train.settings import Settings

from . import intake as reading
from .artifacts import remove_leftovers
from .attempt import Attempt
from .backoff import BACKOFF_SECONDS, backoff
from .child_main import Job, train
from .controls import Controls
from .dead_letter import dead_letter
from .delivery import Delivery, Group, PartitionLost
from .devices import Devices
from .intake import Intake, Message, NotARequest
from .metrics import Metrics
from .obedience import Obedience
from .orders import Interrupted, Orders
from .outcome import cancelled, failed
from .patience import patiently
from .progress import ProgressFeed
from .register import Claim, Register, RunLost
from .reuse import keep_result
from .run_record import MessageId, Terminal
from .running import Running
from .store import Store
from .workspace import Workspace

logger = logging.getLogger(__name__)

GIVE_BACK_SECONDS = 5.0
RUN_LOST_SECONDS = 5.0
"""Until a run that another worker has taken may be taken back, if the partition is still ours then."""


class Supervisor:
    """Takes messages, one at a time a slot, to their ends.

    Args:
        publish_progress: sends a progress event.
        speaks_for: whether it is this worker, of all, that speaks for a job that none has begun.
        job: what a child does.

    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        devices: Devices,
        metrics: Metrics,
        publish_progress: Callable[[TrainProgress], Awaitable[None]],
        speaks_for: Callable[[str], bool],
        job: Job = train,
    ) -> None:
        self._settings, self._store, self._devices, self._metrics = settings, store, devices, metrics
        self._register, self._publish_progress, self._job = Register(store), publish_progress, job
        self._obedience = Obedience(settings, self._register, publish_progress, speaks_for)

    @property
    def controls(self) -> Controls:
        """What jobs are told from outside; to be followed while the worker runs."""
        return self._obedience.controls

    async def handle(self, message: Message, group: Group, orders: Orders) -> None:
        """Take a message to its end; returns when it is passed, or has been given to another worker."""
        source = TopicPartition(message.topic, message.partition)
        try:
            for delay in backoff():
                if source not in group.assignment():
                    logger.info("%s is another worker's now", message.place)
                    return
                try:
                    await orders.interruptible(self.controls.caught_up())
                    async with Delivery(self._settings, group, source, message.offset) as delivery:
                        await self._deliver(delivery, message, orders)
                        return
                except RunLost as error:
                    # most likely the group has given the partition away, and this worker is about to be told
                    delay = max(delay, RUN_LOST_SECONDS)
                    logger.warning("%s waits %.0f s: %s", message.place, delay, error)
                except (KafkaError, StoreUnavailable) as error:
                    logger.warning("%s waits %.0f s: %s", message.place, delay, error or type(error).__name__)
                except (PartitionLost, Interrupted):
                    raise
                except Exception:
                    # skipping the message would lose it silently at the next commit
                    logger.exception("a defect holds up %s; trying again in %.0f s", message.place, delay)
                await orders.interruptible(asyncio.sleep(delay))
        except PartitionLost:
            logger.warning("%s was given to another worker; nothing more is written for it", message.place)
        except Interrupted:
            logger.info("%s is given back: this worker leaves", message.place)

    async def _deliver(self, delivery: Delivery, message: Message, orders: Orders) -> None:
        committed = await delivery.committed()
        if committed is not None and committed > message.offset:
            logger.info("%s has already ended", message.place)
            return delivery.read_on()
        try:
            intake = reading.read(message, self._settings.limits)
        except NotARequest as reason:
            return await self._dead_letter(delivery, message, reason, committed)
        found = await self._find(message, intake)
        if found is None or found.record.state == "running":
            return await self._run(delivery, await self._claim(message, intake), message, intake, orders)
        if not await self._is_published(delivery, found, intake):
            logger.info("job %s run %d had ended; its event is published now", intake.job_id, found.record.run)
            return await self._finish(delivery, found, intake, look_first=True)
        if committed is None:
            # Kafka forgets an idle group's offsets; what this group has published is not to run again for that
            logger.info("%s ended as job %s run %d; it is passed", message.place, intake.job_id, found.record.run)
            return await delivery.skip()
        # Event and offset were committed together, so an offset below the event means that the group was set back.
        logger.info("job %s run %d is published: this is a replay", intake.job_id, found.record.run)
        await patiently(lambda: self._register.published(found))
        return await self._run(delivery, await self._claim(message, intake), message, intake, orders)

    async def _dead_letter(
        self, delivery: Delivery, message: Message, reason: NotARequest, committed: int | None
    ) -> None:
        letter = dead_letter(message, reason, self._settings)
        place = await delivery.place(letter)
        if committed is None and await delivery.is_published(letter, replace(place, end_offset=0)):
            logger.info("%s is a dead letter already; it is passed", message.place)
            await delivery.skip()
            return
        logger.warning("%s is no request (%s); it goes to the dead letters", message.place, reason)
        await delivery.finish(letter, place)
        self._metrics.dead_letters.inc()

    async def _find(self, message: Message, intake: Intake) -> Claim | None:
        identity = MessageId.of(message, self._settings.kafka_group_id)
        return await asyncio.to_thread(self._register.find, intake.job_id, identity)

    async def _claim(self, message: Message, intake: Intake) -> Claim:
        """This very message's unpublished run, else a new run of the job."""
        return await asyncio.to_thread(
            self._register.claim, intake.job_id, message, self._settings.kafka_group_id, self._settings.worker_id
        )

    async def _is_published(self, delivery: Delivery, claim: Claim, intake: Intake) -> bool:
        if claim.record.published:
            return True
        event, place = claim.ended()
        # without transactions an event may be out and its message not passed: then it is published once more
        return self._settings.kafka_transactions and await delivery.is_published(self._record(event, intake), place)

    async def _run(self, delivery: Delivery, claim: Claim, message: Message, intake: Intake, orders: Orders) -> None:
        record = claim.record
        logger.info("job %s run %d attempt %d begins", record.job_id, record.run, claim.attempt)
        folder = self._settings.workspaces / f"{record.job_id}-r{record.run}-a{claim.attempt}"
        workspace = await asyncio.to_thread(Workspace, folder)
        silence = self._settings.kafka_session_timeout_ms / 2000
        first = self._first_event(claim, intake)
        feed = ProgressFeed(self._publish_progress, first, lambda: self._is_ours(running), silence)
        running = Running(message, intake, claim, feed, orders, folder)
        self._obedience.running.add(running)
        try:
            with self._metrics.running.track_inprogress():
                event = await self._end_of(running)
        except (asyncio.CancelledError, Interrupted):
            await asyncio.shield(self._give_back(running))
            raise
        finally:
            self._obedience.running.discard(running)
            await asyncio.to_thread(workspace.remove)
        await self._conclude(delivery, running, event)

    async def _is_ours(self, running: Running) -> bool:
        try:
            await asyncio.to_thread(self._register.require_ours, running.claim)
        except (RunLost, StoreUnavailable) as error:
            logger.info("job %s: nothing is said of it: %s", running.intake.job_id, error)
            return False
        return True

    async def _end_of(self, running: Running) -> Terminal:
        """How the run ends.

        Raises:
            Interrupted: if this worker leaves, and another one will end it.

        """
        try:
            await self._obedience.heed(running)
            return await running.orders.interruptible(self._attempts(running))
        except Interrupted:
            if "leave" in running.orders.given:
                raise
            return self._cancelled(running)

    async def _conclude(self, delivery: Delivery, running: Running, event: Terminal) -> None:
        """Write the run's end into the register, and then into the topic."""
        place = await delivery.place(self._record(event, running.intake))
        ours = running.claim
        claim = await patiently(lambda: self._register.finish(ours, event, place))
        await self._finish(delivery, claim, running.intake)
        await self._keep_for_reuse(running, event)
        self._metrics.ended.labels(event.status).inc()
        logger.info("job %s run %d is %s: %s", event.job_id, event.run, event.status, event.message)
        await running.feed.close(
            phase="ended",
            status=event.status,
            message=event.message,
            progress=event.progress,
            estimated_time_remaining=None,
        )

    async def _keep_for_reuse(self, running: Running, event: Terminal) -> None:
        if running.identity is None or not isinstance(event, TrainCompleted) or event.stopped_early:
            return
        try:
            await asyncio.to_thread(keep_result, self._store, running.identity, event)
        except StoreUnavailable as error:
            logger.info("job %s: its result will not be found by identical requests: %s", event.job_id, error)

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
        outside = self._settings, self._store, self._register, self._devices
        return Attempt(*outside, running, self._job)

    async def _failed_attempt(self, claim: Claim, error: JobError) -> Claim:
        return await patiently(lambda: self._register.attempt_failed(claim, error.code, str(error)))

    async def _next_attempt(self, claim: Claim) -> Claim:
        return await patiently(lambda: self._register.try_again(claim, self._settings.worker_id))

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

    def _record(self, event: Terminal, intake: Intake) -> KafkaRecord:
        return record_for(
            event, source=self._settings.event_source, topics=self._settings.topics, traceparent=intake.traceparent
        )

    async def _finish(self, delivery: Delivery, claim: Claim, intake: Intake, *, look_first: bool = False) -> None:
        """Publish the end that the register holds: the run's first one, whoever else came to another."""
        event, place = claim.ended()
        await patiently(lambda: remove_leftovers(self._store, claim))
        await delivery.finish(self._record(event, intake), place, look_first=look_first)
        try:
            await asyncio.to_thread(self._register.published, claim)
        except (StoreUnavailable, RunLost) as error:
            logger.info("job %s: its register does not say 'published' yet: %s", claim.record.job_id, error)


def _as_job_error(error: Exception) -> JobError:
    """A defect of ours ends the job with a traceback, never the worker."""
    if isinstance(error, JobError):
        return error
    logger.exception("unexpected")
    lines = "".join(format_exception(error)).splitlines()[-20:]
    hint = "This is a defect of the worker; the traceback says where."
    return JobError(f"{type(error).__name__} in the worker", hint, traceback=lines)
