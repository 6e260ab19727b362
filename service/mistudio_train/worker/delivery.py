"""One message's end: a record and the input offset, both or neither. Knows no job; see docs/architecture.md.

A commit counts as done only when the committed offset reads back; after any error the outcome is unknown, and is looked
up. Whose producer it is, and for how long, `deliveries` knows.
"""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError, KafkaTimeoutError
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.structs import OffsetAndMetadata

from mistudio_schemas import KafkaRecord, header

from . import kafka
from .backoff import backoff
from .deliveries import READ_BACK_SECONDS, Deliveries

logger = logging.getLogger(__name__)

RETRY_SECONDS = (0.2, 1.0, 2.0, 5.0, 10.0)


class PartitionLost(Exception):
    """The group has given the partition to another worker: stop, and write nothing more."""


@dataclass(frozen=True)
class Place:
    """Where a terminal event will lie: look for it from `end_offset` on."""

    topic: str
    partition: int
    end_offset: int


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
                await self._deliveries.drop_readers()
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
            await self._deliveries.close()
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
