"""One message's way through the worker: read it, claim its run, let a child do the work, deliver its end.

The order of the steps is the guarantee; docs/architecture.md draws it. Owns no client: store and runner are
given.
"""

import asyncio
import logging
from dataclasses import replace

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from mistudio_schemas import KafkaRecord, TrainCompleted, record_for
from mistudio_train.errors import StoreUnavailable
from mistudio_train.settings import Settings

from . import intake as reading
from .artifacts import remove_leftovers
from .backoff import backoff
from .dead_letter import dead_letter
from .deliveries import Deliveries
from .delivery import Delivery, PartitionLost
from .intake import Intake, Message, NotARequest
from .metrics import Metrics
from .orders import Interrupted, Order, Orders
from .patience import patiently
from .register import Claim, Register, RunLost
from .reuse import keep_result
from .run_record import MessageId, Terminal
from .runner import Runner
from .running import Running
from .store import Store

logger = logging.getLogger(__name__)

LEAVING: frozenset[Order] = frozenset({"leave"})
"""All that keeps a message from its end here: one that is cancelled still has to end so."""
RUN_LOST_SECONDS = 5.0
"""Until a run that another worker has taken may be taken back, if the partition is still ours then."""


class Supervisor:
    """Takes messages, one at a time a slot, to their ends."""

    def __init__(self, settings: Settings, store: Store, metrics: Metrics, runner: Runner) -> None:
        self._settings, self._store, self._metrics, self._runner = settings, store, metrics, runner
        self._register = Register(store)

    async def handle(self, message: Message, deliveries: Deliveries, orders: Orders) -> None:
        """Take a message to its end; returns when it is passed, or has been given to another worker."""
        source = TopicPartition(message.topic, message.partition)
        try:
            for delay in backoff():
                if source not in deliveries.group.assignment():
                    logger.info("%s is another worker's now", message.place)
                    return
                try:
                    await orders.interruptible(self._runner.controls.caught_up(), LEAVING)
                    async with Delivery(deliveries, source, message.offset) as delivery:
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
                await orders.interruptible(asyncio.sleep(delay), LEAVING)
        except PartitionLost:
            logger.warning("%s was given to another worker; nothing more is written for it", message.place)
        except Interrupted:
            logger.info("%s is given back: this worker leaves", message.place)

    async def _deliver(self, delivery: Delivery, message: Message, orders: Orders) -> None:
        committed = await delivery.committed()
        if committed is not None and committed > message.offset:
            return self._pass_by(delivery, message)
        try:
            intake = reading.read(message, self._settings.limits)
        except NotARequest as reason:
            return await self._dead_letter(delivery, message, reason, committed)
        found = await self._find(message, intake)
        if found is None:
            return await self._run(delivery, await self._begin(message, intake, None), message, intake, orders)
        # what another worker has left open of it must be over before anybody can say how far it has come
        await delivery.end_others()
        if await delivery.is_done():
            return self._pass_by(delivery, message)
        return await self._go_on(delivery, found, message, intake, orders)

    @staticmethod
    def _pass_by(delivery: Delivery, message: Message) -> None:
        logger.info("%s has already ended", message.place)
        delivery.read_on()

    async def _go_on(self, delivery: Delivery, found: Claim, message: Message, intake: Intake, orders: Orders) -> None:
        """With a message that has a run already."""
        if found.record.state == "running":
            claim = await asyncio.to_thread(self._register.take_over, found, self._settings.worker_id)
            return await self._run(delivery, claim, message, intake, orders)
        if not await self._is_published(delivery, found, intake):
            logger.info("job %s run %d had ended; its event is published now", intake.job_id, found.record.run)
            await self._finish(delivery, found, intake)
            return await self._runner.tell_end(found.ended()[0])
        if await delivery.committed() is None:
            # Kafka forgets an idle group's offsets; what this group has published is not to run again for that
            logger.info("%s ended as job %s run %d; it is passed", message.place, intake.job_id, found.record.run)
            return await delivery.skip()
        # Event and offset were committed together, so an offset below the event means that the group was set back.
        logger.info("job %s run %d is published: this is a replay", intake.job_id, found.record.run)
        await patiently(lambda: self._register.published(found))
        return await self._run(delivery, await self._begin(message, intake, found), message, intake, orders)

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
        return await asyncio.to_thread(self._register.find, intake.job_id, self._identity(message))

    async def _begin(self, message: Message, intake: Intake, newest: Claim | None) -> Claim:
        """A new run of the job, after the message's newest one."""
        new = intake.job_id, self._identity(message), self._settings.worker_id, self._runner.controls.read_to
        return await asyncio.to_thread(self._register.create, *new, newest.record.run if newest else 0)

    def _identity(self, message: Message) -> MessageId:
        return MessageId.of(message, self._settings.kafka_group_id)

    async def _is_published(self, delivery: Delivery, claim: Claim, intake: Intake) -> bool:
        if claim.record.published:
            return True
        event, place = claim.ended()
        # without transactions an event may be out and its message not passed: then it is published once more
        return self._settings.kafka_transactions and await delivery.is_published(self._record(event, intake), place)

    async def _run(self, delivery: Delivery, claim: Claim, message: Message, intake: Intake, orders: Orders) -> None:
        running = self._runner.take_on(claim, message, intake, orders)
        await self._conclude(delivery, running, await self._runner.end_of(running))

    async def _conclude(self, delivery: Delivery, running: Running, event: Terminal) -> None:
        """Write the run's end into the register, and then into the topic."""
        place = await delivery.place(self._record(event, running.intake))
        ours, read_to = running.claim, self._runner.controls.read_to
        claim = await patiently(lambda: self._register.finish(ours, event, place, read_to))
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

    def _record(self, event: Terminal, intake: Intake) -> KafkaRecord:
        return record_for(
            event, source=self._settings.event_source, topics=self._settings.topics, traceparent=intake.traceparent
        )

    async def _finish(self, delivery: Delivery, claim: Claim, intake: Intake) -> None:
        """Publish the end that the register holds: the run's first one, whoever else came to another."""
        event, place = claim.ended()
        await patiently(lambda: remove_leftovers(self._store, claim))
        await delivery.finish(self._record(event, intake), place)
        try:
            await asyncio.to_thread(self._register.published, claim)
        except (StoreUnavailable, RunLost) as error:
            logger.info("job %s: its register does not say 'published' yet: %s", claim.record.job_id, error)
