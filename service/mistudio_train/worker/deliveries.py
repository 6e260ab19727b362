"""The clients with which a slot delivers: a transactional producer and two readers. Knows no message.

The pattern is a producer a partition, `{group}.{topic}.{partition}`: starting one fences whoever had the partition
before and ends what it left open. It is kept from one message to the next (docs/decisions/0009).
"""

import asyncio
from typing import Protocol

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaTimeoutError
from aiokafka.structs import OffsetAndMetadata

from mistudio_train.settings import Settings

from . import kafka

READ_BACK_SECONDS = 10.0
"""That the broker may take to show what it has acknowledged."""


class Group(Protocol):
    """What a delivery needs of the group's consumer (aiokafka's has it)."""

    def assignment(self) -> frozenset[TopicPartition]:
        """The partitions that are ours now."""
        ...

    async def committed(self, partition: TopicPartition) -> int | None:
        """The group's committed offset."""
        ...

    async def commit(self, offsets: dict[TopicPartition, OffsetAndMetadata]) -> None:
        """Commit offsets, without a transaction."""
        ...

    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        """Where each partition ends now."""
        ...

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Read on from there."""
        ...


def transactional_id(settings: Settings, source: TopicPartition) -> str:
    """Of the producer that ends a partition's messages: whoever starts one with it fences all earlier ones."""
    return f"{settings.kafka_group_id}.{source.topic}.{source.partition}"


class Deliveries:
    """A slot's deliveries, one after another, with one producer for as long as nothing raises a doubt of it.

    Starting a producer takes longer than delivering with it, so the last one is kept for its partition's next message.
    Readers are kept beside it: the group's consumer answers no question while it waits for messages.

    Args:
        group: the slot's consumer.

    """

    def __init__(self, settings: Settings, group: Group) -> None:
        self.settings, self.group = settings, group
        self.producer: AIOKafkaProducer | None = None
        self._of: TopicPartition | None = None
        self._doubted = False
        self._unblocked: set[TopicPartition] = set()
        self._readers: dict[kafka.Isolation, AIOKafkaConsumer] = {}

    def doubt(self) -> None:
        """Let the next message have a producer of its own: the group is shared out anew, and may have fenced this one.

        A message under way keeps its producer: if its partition stays, nobody else has started one.
        """
        self._doubted = True

    async def begin(self, source: TopicPartition) -> None:
        """Have a producer for a message of this partition: the kept one, if it is the partition's."""
        if self.producer is None or self._of != source or self._doubted:
            await self.begin_anew(source)

    async def begin_anew(self, source: TopicPartition) -> None:
        """Start a producer: all that others have left open of this partition is over then."""
        await self.drop_producer()
        self._doubted = False
        name = transactional_id(self.settings, source) if self.settings.kafka_transactions else None
        producer = kafka.producer(self.settings, name)
        await kafka.start(producer)
        self.producer, self._of = producer, source
        self._unblocked.clear()

    async def unblock(self, where: TopicPartition) -> None:
        """End what the producer's predecessors have left open in a partition; to be done before it is read or written.

        A broker that dies at a transaction's end may lose its markers. What was written then stays hidden, with all
        behind it, until the producer's next marker there, which decides for both: that of an aborted record, where
        anything is open. It counts as aborted when readers can pass it, for its own marker may be lost as well.

        Raises:
            KafkaTimeoutError: if they cannot.

        """
        if not self.settings.kafka_transactions or where in self._unblocked:
            return
        end = await self.end_offset(where, "read_uncommitted")
        if await self.end_offset(where) < end:
            await self._abort_one(where)
        self._unblocked.add(where)

    async def _abort_one(self, where: TopicPartition) -> None:
        producer = self.require_producer()
        await producer.begin_transaction()
        record = await producer.send_and_wait(where.topic, None, key=b"aborted", partition=where.partition)
        await producer.abort_transaction()
        try:
            async with asyncio.timeout(READ_BACK_SECONDS):
                while await self.end_offset(where) <= record.offset:  # noqa: ASYNC110 - only the broker knows
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise KafkaTimeoutError(f"a transaction stays open in {where.topic}-{where.partition}") from None

    def require_producer(self) -> AIOKafkaProducer:
        """The producer. Raises `KafkaTimeoutError` if an error has cost it."""
        if self.producer is None:
            raise KafkaTimeoutError("no producer")
        return self.producer

    async def end_offset(self, where: TopicPartition, isolation: kafka.Isolation = "read_committed") -> int:
        """Where a partition of any topic ends now; `read_committed`: or the first open transaction begins."""
        if isolation not in self._readers:
            reader = kafka.reader(self.settings, isolation)
            await kafka.start(reader)
            self._readers[isolation] = reader
        end: int = (await self._readers[isolation].end_offsets([where]))[where]
        return end

    async def drop_producer(self) -> None:
        """End the producer, if there is one."""
        producer, self.producer = self.producer, None
        if producer is not None:
            await kafka.close(producer)

    async def close(self) -> None:
        """End all clients."""
        await self.drop_producer()
        await self.drop_readers()

    async def drop_readers(self) -> None:
        """End the readers."""
        while self._readers:
            await kafka.close(self._readers.popitem()[1])
