"""One message's end: a record and the input offset, both or neither. Knows no job; see docs/architecture.md.

The pattern is a transactional producer a partition, `{group}.{topic}.{partition}`: starting one fences whoever had the
partition before and ends what it left open. It is kept from one message to the next. A commit counts as done only when
the committed offset reads back; after any error the outcome is unknown, and is looked up.
"""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, Self

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError, KafkaTimeoutError
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.structs import OffsetAndMetadata

from mistudio_schemas import KafkaRecord, header
from mistudio_train.settings import Settings

from . import kafka
from .backoff import backoff

logger = logging.getLogger(__name__)

READ_BACK_SECONDS = 10.0
RETRY_SECONDS = (0.2, 1.0, 2.0, 5.0, 10.0)


class PartitionLost(Exception):
    """The group has given the partition to another worker: stop, and write nothing more."""


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


@dataclass(frozen=True)
class Place:
    """Where a terminal event will lie: look for it from `end_offset` on."""

    topic: str
    partition: int
    end_offset: int


def transactional_id(settings: Settings, source: TopicPartition) -> str:
    """Of the producer that ends a partition's messages: whoever starts one with it fences all earlier ones."""
    return f"{settings.kafka_group_id}.{source.topic}.{source.partition}"


class Deliveries:
    """A slot's deliveries, one after another, with one producer for as long as nothing raises a doubt of it.

    Starting a producer takes longer than delivering with it, so the last one is kept for its partition's next message.
    A reader is kept beside it: the group's consumer answers no question while it waits for messages.

    Args:
        group: the slot's consumer.

    """

    def __init__(self, settings: Settings, group: Group) -> None:
        self.settings, self.group = settings, group
        self.producer: AIOKafkaProducer | None = None
        self._of: TopicPartition | None = None
        self._doubted = False
        self._unblocked: set[TopicPartition] = set()
        self._reader: AIOKafkaConsumer | None = None

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

        A broker that dies in a commit may lose its markers. What was written then stays hidden, with all behind it,
        until the producer's next marker there, which decides for both: one aborted record, once, in each partition.
        """
        if not self.settings.kafka_transactions or where in self._unblocked:
            return
        producer = self.require_producer()
        await producer.begin_transaction()
        await producer.send_and_wait(where.topic, None, key=b"aborted", partition=where.partition)
        await producer.abort_transaction()
        self._unblocked.add(where)

    def require_producer(self) -> AIOKafkaProducer:
        """The producer. Raises `KafkaTimeoutError` if an error has cost it."""
        if self.producer is None:
            raise KafkaTimeoutError("no producer")
        return self.producer

    async def end_offset(self, where: TopicPartition) -> int:
        """Where a partition of any topic ends now, or the first transaction begins that has not ended in it."""
        if self._reader is None:
            reader = kafka.reader(self.settings)
            await kafka.start(reader)
            self._reader = reader
        end: int = (await self._reader.end_offsets([where]))[where]
        return end

    async def drop_producer(self) -> None:
        """End the producer, if there is one."""
        producer, self.producer = self.producer, None
        if producer is not None:
            await kafka.close(producer)

    async def close(self) -> None:
        """End all clients."""
        await self.drop_producer()
        await self.drop_reader()

    async def drop_reader(self) -> None:
        """End the reader, if there is one."""
        reader, self._reader = self._reader, None
        if reader is not None:
            await kafka.close(reader)


class Delivery:
    """The way of one message to its end, as an async context manager.

    Args:
        deliveries: of the slot that has received the message.
        offset: the message's.

    """

    def __init__(self, deliveries: Deliveries, source: TopicPartition, offset: int) -> None:
        self._deliveries, self._source, self._offset = deliveries, source, offset
        self._settings, self._group = deliveries.settings, deliveries.group
        self._name = f"{source.topic}-{source.partition}@{offset}"

    async def __aenter__(self) -> Self:
        await self._deliveries.begin(self._source)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None:
            await self._deliveries.close()

    async def committed(self) -> int | None:
        """The partition's committed offset, `None` if the group has none.

        A commit of the partition's former owner may be under way; after `end_others` it is not.
        """
        return await self._group.committed(self._source)

    async def end_others(self) -> None:
        """Fence every other worker that ever had the partition, and see the end of what it has left open."""
        await self._deliveries.begin_anew(self._source)

    async def is_done(self) -> bool:
        """Whether the group has already passed this message."""
        committed = await self.committed()
        return committed is not None and committed > self._offset

    async def place(self, record: KafkaRecord) -> Place:
        """The partition that `record` will go to and its present end; note it before `finish`.

        Waits for a broker that is away for as long as the partition is ours: the work that `record` tells of is done.

        Raises:
            PartitionLost: if the partition is no longer ours.

        """
        for delay in backoff(RETRY_SECONDS):
            self._require_partition()
            try:
                return await self._place(record)
            except (KafkaError, ConnectionError, TimeoutError) as error:
                logger.warning("no place for the end of %s yet: %s; again in %.1f s", self._name, error, delay)
                await self._deliveries.drop_reader()
            await asyncio.sleep(delay)
        raise AssertionError("backoff has no end")

    async def _place(self, record: KafkaRecord) -> Place:
        # not with another producer: whoever starts one has to see again whether the message is done
        partitions = sorted(await self._deliveries.require_producer().partitions_for(record.topic))
        partition = DefaultPartitioner()(record.key, partitions, partitions)
        where = TopicPartition(record.topic, partition)
        return Place(record.topic, partition, await self._deliveries.end_offset(where))

    async def finish(self, record: KafkaRecord, place: Place) -> None:
        """Publish `record` and pass the message, exactly once (at least once without transactions).

        Waits for a broker that is away for as long as the partition is ours.

        Raises:
            PartitionLost: if the partition is no longer ours; whoever has it finds what we left.

        """
        for delay in backoff(RETRY_SECONDS):
            if await self._try_to_finish(record, place):
                return self.read_on()
            self._require_partition()
            logger.warning("the end of %s is not confirmed; looking again in %.1f s", self._name, delay)
            await asyncio.sleep(delay)
        raise AssertionError("backoff has no end")

    async def skip(self) -> None:
        """Pass a message of a group that has no committed offset, and that has ended before.

        The offset is committed behind the last of them only: one in their midst would make the next one look as if the
        group had been set back to it.
        """
        end = (await self._group.end_offsets([self._source]))[self._source]
        if self._offset + 1 >= end:
            await self._commit(None, Place(self._source.topic, self._source.partition, 0))
            if not await self._reads_back():
                raise KafkaTimeoutError("the offset does not read back")
        self.read_on()

    def read_on(self) -> None:
        """A rebalance that kept the partition may have put the position back; else the job would run twice."""
        if self._source in self._group.assignment():
            self._group.seek(self._source, self._offset + 1)

    async def _try_to_finish(self, record: KafkaRecord, place: Place) -> bool:
        try:
            if self._deliveries.producer is None:
                self._require_partition()  # else a zombie would fence the owner
                await self.end_others()
                if await self.is_done():
                    return True
                published = await self.is_published(record, place)
            else:
                published = False
            self._require_partition()
            await self._commit(None if published else record, place)
            return await self._reads_back()
        except (KafkaError, KafkaTimeoutError, AssertionError, ConnectionError, TimeoutError) as error:
            # aiokafka raises AssertionError from a producer that an earlier error has killed
            logger.warning("unknown outcome on %s: %s", self._name, type(error).__name__)
            await self._deliveries.drop_producer()
            return False

    async def _commit(self, record: KafkaRecord | None, place: Place) -> None:
        """One short transaction: the record, and the offset behind the message."""
        offsets = {self._source: OffsetAndMetadata(self._offset + 1, "")}
        producer = self._deliveries.require_producer()
        if not self._settings.kafka_transactions:
            if record is not None:
                await self._send(producer, record, place)
            await self._group.commit(offsets)
            return
        if record is not None:
            await self._deliveries.unblock(TopicPartition(place.topic, place.partition))
        await producer.begin_transaction()
        if record is not None:
            await self._send(producer, record, place)
        await producer.send_offsets_to_transaction(offsets, self._settings.kafka_group_id)
        await producer.commit_transaction()

    @staticmethod
    async def _send(producer: AIOKafkaProducer, record: KafkaRecord, place: Place) -> None:
        await producer.send_and_wait(
            record.topic, record.value, key=record.key, partition=place.partition, headers=record.headers
        )

    async def _reads_back(self) -> bool:
        """Whether the committed offset is there; a commit's answer alone can be lost with its broker."""
        try:
            async with asyncio.timeout(READ_BACK_SECONDS):
                while not await self.is_done():  # noqa: ASYNC110 - only the broker knows
                    await asyncio.sleep(0.02)
        except TimeoutError:
            await self._deliveries.drop_producer()
            return False
        return True

    async def is_published(self, record: KafkaRecord, place: Place) -> bool:
        """Whether the committed record lies at the place, whichever worker put it there.

        Raises:
            PartitionLost: if the partition is no longer ours.

        """
        where = TopicPartition(place.topic, place.partition)
        await self._deliveries.unblock(where)
        # up to the very end: somebody's open transaction, which is over in a minute, may hide what lies behind it
        end = (await self._group.end_offsets([where]))[where]
        async with kafka.started(kafka.reader(self._settings)) as reader:
            reader.assign([where])
            reader.seek(where, place.end_offset)
            while await reader.position(where) < end:
                self._require_partition()
                batch = await reader.getmany(where, timeout_ms=500)
                if any(_identity(found.headers) == _identity(record.headers) for found in batch.get(where, [])):
                    return True
            return False

    def _require_partition(self) -> None:
        if self._source not in self._group.assignment():
            raise PartitionLost(f"{self._source.topic}-{self._source.partition}")


def _identity(headers: Iterable[tuple[str, bytes]]) -> tuple[str | None, ...]:
    """What makes a terminal event or a dead letter the same one, published by whomever."""
    newest_first = list(headers)[::-1]
    names = ("ce_id", *(f"kafka_dlt-original-{part}" for part in ("topic", "partition", "offset")))
    return tuple(header(newest_first, name) for name in names)
