"""A slot: one member of the consumer group that runs one job at a time. Joins FastStream's loop to the supervisor."""

import asyncio
import logging
from collections.abc import Iterable

from aiokafka import ConsumerRebalanceListener, ConsumerRecord, TopicPartition

from mistudio_train.settings import Settings

from .deliveries import Deliveries, Group
from .intake import Message
from .metrics import Metrics
from .orders import Orders
from .supervisor import Supervisor

logger = logging.getLogger(__name__)


class Slot(ConsumerRebalanceListener):  # type: ignore[misc]
    """Runs messages one after another; a partition that the group gives away takes its job with it.

    Args:
        ready: set when all slots of this worker have joined.

    """

    def __init__(
        self, number: int, settings: Settings, supervisor: Supervisor, metrics: Metrics, ready: asyncio.Event
    ) -> None:
        self.number, self._settings, self._supervisor = number, settings, supervisor
        self._metrics, self._ready = metrics, ready
        self.assigned: frozenset[TopicPartition] | None = None
        self.busy: TopicPartition | None = None
        """Of the message at hand."""
        self.begun = 0
        """Messages so far."""
        self.idle = asyncio.Event()
        self.idle.set()
        self._settled = asyncio.Event()
        self._settled.set()
        self._stopping = False
        self._job: asyncio.Task[None] | None = None
        self._orders = Orders()
        self._deliveries: Deliveries | None = None

    async def on_message(self, record: ConsumerRecord, group: Group) -> None:
        """FastStream's handler; it returns when the message has ended or is no longer ours."""
        self.busy = TopicPartition(record.topic, record.partition)
        self.begun += 1
        self.idle.clear()
        try:
            await self._ready.wait()
            # a job begun while the group shares out its partitions would not be known to be running
            await self._settled.wait()
            if not self._stopping and self.busy in group.assignment():
                await self._run(as_message(record), group)
            # else FastStream hands over what it has fetched until it is stopped itself; the end of a later message
            # would commit an offset beyond the job that has just been given back
        finally:
            self.busy = None
            self.idle.set()

    async def _run(self, message: Message, group: Group) -> None:
        self._orders = Orders()
        if self._deliveries is None:
            self._deliveries = Deliveries(self._settings, group)
        self._job = asyncio.create_task(self._supervisor.handle(message, self._deliveries, self._orders))
        try:
            await asyncio.shield(self._job)
        except asyncio.CancelledError:
            await self._give_back()
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
        finally:
            self._job = None

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Every rebalance names every partition here; only `on_partitions_assigned` tells which ones stay."""
        self._settled.clear()
        if self._deliveries is not None:
            self._deliveries.doubt()

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """After a rebalance: a job whose partition is gone stops before anything is written."""
        self.assigned = frozenset(assigned)
        self._metrics.rebalances.inc()
        self._settled.set()
        logger.info("slot %d has %d partitions", self.number, len(self.assigned))
        if self._job is not None and self.busy not in self.assigned:
            logger.warning("slot %d has lost %s; its job stops here", self.number, self.busy)
            self._metrics.moved.inc()
            self._job.cancel()

    async def stop(self, seconds: float) -> None:
        """Begin no other job, and give the running one so long to leave; not committed, it is delivered again."""
        self._stopping = True
        self._settled.set()
        if self._job is not None:
            self._orders.leave(seconds)
            await asyncio.wait({self._job}, timeout=seconds)
        await self._give_back()
        if self._deliveries is not None:
            await self._deliveries.close()

    async def _give_back(self) -> None:
        if self._job is not None:
            self._job.cancel()
            await asyncio.gather(self._job, return_exceptions=True)


def as_message(record: ConsumerRecord) -> Message:
    """The record without its client."""
    return Message(
        record.topic,
        record.partition,
        record.offset,
        record.timestamp,
        record.key,
        record.value,
        tuple(record.headers),
    )
