"""One message's way through the worker: read it, claim its run, let a child do the work, deliver its end.

The order of the steps is the guarantee; docs/architecture.md draws it. Owns no client: store, register, devices and
the progress topic are given.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from traceback import format_exception
from typing import TypeVar

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from mistudio_schemas import (
    KafkaRecord,
    TrainProgress,
    record_for,
)
from mistudio_train.errors import ChildDied, JobError, StoreUnavailable
from mistudio_train.settings import Settings

from . import intake as reading
from .attempt import Attempt
from .backoff import BACKOFF_SECONDS, backoff
from .child_main import Job, train
from .dead_letter import dead_letter
from .delivery import Delivery, Group, PartitionLost, Place
from .devices import Devices
from .intake import Intake, Message, NotARequest
from .metrics import Metrics
from .outcome import Who, failed
from .progress import ProgressFeed
from .register import Claim, Register, RunLost
from .run_record import Terminal
from .store import Store

logger = logging.getLogger(__name__)

GIVE_BACK_SECONDS = 5.0
T = TypeVar("T")


class Supervisor:
    """Takes messages, one at a time a slot, to their ends.

    Args:
        publish_progress: sends a progress event.
        job: what a child does.

    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        devices: Devices,
        metrics: Metrics,
        publish_progress: Callable[[TrainProgress], Awaitable[None]],
        job: Job = train,
    ) -> None:
        self._settings, self._store, self._devices, self._metrics = settings, store, devices, metrics
        self._register = Register(store)
        self._publish_progress, self._job = publish_progress, job

    async def handle(self, message: Message, group: Group) -> None:
        """Take a message to its end; returns when it is passed, or has been given to another worker."""
        source = TopicPartition(message.topic, message.partition)
        for delay in backoff():
            if source not in group.assignment():
                logger.info("%s is another worker's now", message.place)
                return
            try:
                async with Delivery(self._settings, group, source, message.offset) as delivery:
                    await self._deliver(delivery, message)
                    return
            except PartitionLost:
                logger.warning("%s was given to another worker; nothing more is written for it", message.place)
                return
            except (KafkaError, StoreUnavailable, RunLost) as error:
                logger.warning("%s has to wait %.0f s: %s", message.place, delay, error or type(error).__name__)
            except Exception:
                # skipping the message would lose it silently at the next commit
                logger.exception("a defect holds up %s; trying again in %.0f s", message.place, delay)
            await asyncio.sleep(delay)

    async def _deliver(self, delivery: Delivery, message: Message) -> None:
        if await delivery.is_done():
            logger.info("%s has already ended", message.place)
            return await delivery.pass_by()
        try:
            intake = reading.read(message, self._settings.limits)
        except NotARequest as reason:
            logger.warning("%s is no request (%s); it goes to the dead letters", message.place, reason)
            self._metrics.dead_letters.inc()
            letter = dead_letter(message, reason, self._settings)
            return await delivery.finish(letter, await delivery.place(letter))
        claim = await self._claim(message, intake)
        if claim.record.state == "running":
            return await self._run(delivery, claim, intake)
        return await self._ended_before(delivery, message, claim, intake)

    async def _claim(self, message: Message, intake: Intake) -> Claim:
        """This very message's unpublished run, else a new run of the job."""
        return await asyncio.to_thread(
            self._register.claim, intake.job_id, message, self._settings.kafka_group_id, self._settings.worker_id
        )

    async def _run(self, delivery: Delivery, claim: Claim, intake: Intake) -> None:
        record = claim.record
        logger.info("job %s run %d attempt %d begins", record.job_id, record.run, claim.attempt)
        feed = ProgressFeed(self._publish_progress, self._first_event(claim, intake))
        with self._metrics.running.track_inprogress():
            claim, event = await self._attempts(claim, intake, feed)
        place = await delivery.place(self._record(event, intake))
        ours = claim
        claim = await self._patiently(lambda: self._register.finish(ours, event, place))
        ended, place = claim.ended()  # the run's first end, should a lost answer have hidden it from us
        await self._finish(delivery, claim, self._record(ended, intake), place)
        self._metrics.ended.labels(event.status).inc()
        logger.info("job %s run %d is %s: %s", record.job_id, record.run, event.status, event.message)
        await feed.close(
            phase="ended",
            status=event.status,
            message=event.message,
            progress=event.progress,
            estimated_time_remaining=None,
        )

    async def _attempts(self, claim: Claim, intake: Intake, feed: ProgressFeed) -> tuple[Claim, Terminal]:
        """Try until there is a result, an error that trying again does not mend, or no attempt left."""
        while True:
            try:
                if intake.request is None:
                    raise intake.refusal or JobError("no request", "This is a defect of the worker.")
                self._require_attempts(claim)
                return claim, await self._attempt(claim, intake, feed).run()
            except asyncio.CancelledError:
                await asyncio.shield(self._give_back(claim))
                raise
            except (RunLost, PartitionLost):
                raise
            except Exception as unexpected:
                error = _as_job_error(unexpected)
                claim = await self._failed_attempt(claim, error)
                tried = claim.failed_attempts
                if not error.retryable or tried >= self._settings.max_attempts:
                    return claim, failed(self._who(claim), error, feed.current, claim.failed_attempts)
                delay = BACKOFF_SECONDS[min(tried - 1, len(BACKOFF_SECONDS) - 1)]
                logger.warning("job %s: %s; attempt %d in %.0f s", claim.record.job_id, error, tried + 1, delay)
                feed.say(message=f"{error}; tried again in {delay:.0f} s")
                await asyncio.sleep(delay)
                claim = await self._next_attempt(claim)
                feed.begin_again(claim.attempt)

    def _require_attempts(self, claim: Claim) -> None:
        """Refuse one more try of a run whose workers died, as often as it may fail: it may well have killed them."""
        if (lost := claim.failed_attempts) >= self._settings.max_attempts:
            raise ChildDied(
                f"the run was given up after {lost} attempts: the worker itself died in the last one",
                "Look at that worker's end (out of memory?); ask for less memory, or raise MAX_ATTEMPTS.",
            )

    async def _give_back(self, claim: Claim) -> None:
        """Note that this attempt was stopped in good order, so that it counts as no failure; if it can be done soon."""
        try:
            async with asyncio.timeout(GIVE_BACK_SECONDS):
                await asyncio.to_thread(
                    self._register.attempt_stopped, claim, "the worker was stopped, or lost the run"
                )
        except (RunLost, StoreUnavailable, TimeoutError) as error:
            logger.info("job %s: its register does not say 'stopped': %s", claim.record.job_id, error)

    def _attempt(self, claim: Claim, intake: Intake, feed: ProgressFeed) -> Attempt:
        outside = self._settings, self._store, self._devices
        return Attempt(*outside, self._who(claim), claim, intake, feed, self._patiently, self._job)

    async def _failed_attempt(self, claim: Claim, error: JobError) -> Claim:
        return await self._patiently(lambda: self._register.attempt_failed(claim, error.code, str(error)))

    async def _next_attempt(self, claim: Claim) -> Claim:
        return await self._patiently(lambda: self._register.take_over(claim, self._settings.worker_id))

    def _first_event(self, claim: Claim, intake: Intake) -> TrainProgress:
        return TrainProgress(
            **vars(self._who(claim)),
            status="running",
            phase="accepting",
            message="a worker has taken the job",
            unknown_fields=intake.unknown,
        )

    def _who(self, claim: Claim) -> Who:
        return Who(claim.record.job_id, claim.record.run, claim.attempt, self._settings.worker_id)

    def _record(self, event: Terminal, intake: Intake) -> KafkaRecord:
        return record_for(
            event, source=self._settings.event_source, topics=self._settings.topics, traceparent=intake.traceparent
        )

    async def _ended_before(self, delivery: Delivery, message: Message, claim: Claim, intake: Intake) -> None:
        """The run had ended when its worker did: its event goes out as it is, if it has not."""
        event, place = claim.ended()
        record = self._record(event, intake)
        if self._settings.kafka_transactions and await delivery.is_published(record, place):
            # Event and offset were committed together, so an offset below the event means that the group was rewound.
            logger.info("job %s run %d is published: this is a replay", intake.job_id, claim.record.run)
            await self._patiently(lambda: self._register.published(claim))
            await self._run(delivery, await self._claim(message, intake), intake)
        else:
            logger.info("job %s run %d had ended; its event is published now", intake.job_id, claim.record.run)
            await self._finish(delivery, claim, record, place, look_first=True)

    async def _finish(
        self, delivery: Delivery, claim: Claim, record: KafkaRecord, place: Place, *, look_first: bool = False
    ) -> None:
        await delivery.finish(record, place, look_first=look_first)
        try:
            await asyncio.to_thread(self._register.published, claim)
        except (StoreUnavailable, RunLost) as error:
            logger.info("job %s: its register does not say 'published' yet: %s", claim.record.job_id, error)

    async def _patiently(self, call: Callable[[], T]) -> T:
        """A blocking call to the store, again and again while the store is away."""
        for delay in backoff():
            try:
                return await asyncio.to_thread(call)
            except StoreUnavailable as error:
                logger.warning("the store does not answer, trying again in %.0f s: %s", delay, error)
                await asyncio.sleep(delay)
        raise AssertionError("backoff has no end")


def _as_job_error(error: Exception) -> JobError:
    """A defect of ours ends the job with a traceback, never the worker."""
    if isinstance(error, JobError):
        return error
    logger.exception("unexpected")
    lines = "".join(format_exception(error)).splitlines()[-20:]
    hint = "This is a defect of the worker; the traceback says where."
    return JobError(f"{type(error).__name__} in the worker", hint, traceback=lines)
