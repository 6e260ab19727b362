"""One record and one offset, both or neither, on a real Kafka; every window where the outcome is unknown."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaConnectionError

from mistudio_schemas import KafkaRecord, header
from mistudio_train.settings import Settings
from mistudio_train.worker import kafka
from mistudio_train.worker.dead_letter import dead_letter
from mistudio_train.worker.deliveries import Deliveries
from mistudio_train.worker.delivery import Delivery, PartitionLost
from mistudio_train.worker.intake import Message, NotARequest

OFFSET = 0


class Worker:
    """A group member that holds partition 0 of `train.requested`, with one message in it."""

    def __init__(self, settings: Settings, consumer: AIOKafkaConsumer) -> None:
        self.settings, self.consumer = settings, consumer
        self.source = TopicPartition(settings.topics.requested, 0)

    @asynccontextmanager
    async def deliveries(self) -> AsyncIterator[Deliveries]:
        deliveries = Deliveries(self.settings, self.consumer)
        try:
            yield deliveries
        finally:
            await deliveries.close()

    @asynccontextmanager
    async def delivery(self) -> AsyncIterator[Delivery]:
        async with self.deliveries() as deliveries, Delivery(deliveries, self.source, OFFSET) as delivery:
            yield delivery

    def record(self) -> KafkaRecord:
        return KafkaRecord(self.settings.topics.completed, b"job-1", b"{}", [("ce_id", b"id-1")])

    async def published(self, topic: str) -> list[Any]:
        async with kafka.started(kafka.reader(self.settings)) as reader:
            (plan,) = [plan for plan in kafka.topic_plans(self.settings) if plan.name == topic]
            parts = [TopicPartition(topic, number) for number in range(plan.partitions)]
            reader.assign(parts)
            await reader.seek_to_beginning(*parts)
            ends, found = await reader.end_offsets(parts), []
            for part in parts:
                while await reader.position(part) < ends[part]:
                    found += (await reader.getmany(part, timeout_ms=500)).get(part, [])
            return found

    async def committed(self) -> int | None:
        offset: int | None = await self.consumer.committed(self.source)
        return offset


@asynccontextmanager
async def working(settings: Settings) -> AsyncIterator[Worker]:
    await kafka.ensure_topics(settings)
    async with kafka.started(kafka.producer(settings)) as producer:
        await producer.send_and_wait(settings.topics.requested, b"{}", partition=0)
    consumer = AIOKafkaConsumer(
        settings.topics.requested,
        **kafka.client_options(settings),
        group_id=settings.kafka_group_id,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    async with kafka.started(consumer):
        await consumer.getone()
        yield Worker(settings, consumer)


@pytest.fixture
async def worker(worker_settings: Settings) -> AsyncIterator[Worker]:
    async with working(worker_settings) as made:
        yield made


async def test_a_message_ends_once_with_its_record_and_its_offset(worker: Worker) -> None:
    async with worker.delivery() as delivery:
        assert not await delivery.is_done()
        record = worker.record()
        await delivery.finish(record, await delivery.place(record))
        assert await delivery.is_done()
    assert await worker.committed() == OFFSET + 1
    (found,) = await worker.published(record.topic)
    assert (found.key, found.value, header(found.headers, "ce_id")) == (b"job-1", b"{}", "id-1")


async def test_a_second_worker_sees_that_the_message_has_ended(worker: Worker) -> None:
    async with worker.delivery() as first:
        await first.finish(worker.record(), await first.place(worker.record()))
    async with worker.delivery() as second:
        assert await second.is_done()


async def test_a_fenced_worker_adds_nothing(worker: Worker) -> None:
    record = worker.record()
    async with worker.delivery() as zombie, worker.delivery() as owner:
        place = await owner.place(record)
        await owner.finish(record, place)
        await zombie.finish(record, place)  # the broker refuses it; the committed offset says that all is done
    assert len(await worker.published(record.topic)) == 1


async def deliver(worker: Worker, deliveries: Deliveries, offset: int) -> AIOKafkaProducer:
    """The producer that did it."""
    async with Delivery(deliveries, worker.source, offset) as delivery:
        record = replace(worker.record(), headers=[("ce_id", f"id-{offset}".encode())])
        await delivery.finish(record, await delivery.place(record))
        return deliveries.producer


async def test_the_producer_is_kept_until_something_raises_a_doubt_of_it(worker: Worker) -> None:
    async with worker.deliveries() as deliveries:
        first = await deliver(worker, deliveries, 0)
        assert await deliver(worker, deliveries, 1) is first
        deliveries.doubt()
        second = await deliver(worker, deliveries, 2)
        assert second is not first
        with pytest.raises(ZeroDivisionError):
            async with Delivery(deliveries, worker.source, 3):
                raise ZeroDivisionError
        assert deliveries.producer is None
        assert await deliver(worker, deliveries, 3) is not second
        await deliveries.begin(TopicPartition(worker.source.topic, 1))
        assert await deliver(worker, deliveries, 4) is not second
    assert len(await worker.published(worker.record().topic)) == 5
    assert await worker.committed() == 5


async def test_a_kept_producer_that_was_fenced_meanwhile_adds_nothing(worker: Worker) -> None:
    async with worker.deliveries() as zombies, worker.deliveries() as owners:
        await deliver(worker, zombies, 0)
        await deliver(worker, owners, 1)
        await deliver(worker, zombies, 1)  # the broker refuses it; the committed offset says that all is done
    assert len(await worker.published(worker.record().topic)) == 2
    assert await worker.committed() == 2


def raising_after(method: Callable[..., Awaitable[None]], times: int) -> Callable[..., Awaitable[None]]:
    """The method does its work, and its answer is lost."""
    left = times

    async def call(self: AIOKafkaProducer, *args: Any) -> None:
        nonlocal left
        await method(self, *args)
        if left:
            left -= 1
            raise KafkaConnectionError("the answer was lost")

    return call


@pytest.mark.parametrize("method", ["begin_transaction", "send_offsets_to_transaction", "commit_transaction"])
async def test_a_lost_answer_is_looked_up_and_the_record_is_there_once(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    original = getattr(AIOKafkaProducer, method)
    async with worker.delivery() as delivery:
        record = worker.record()
        place = await delivery.place(record)
        monkeypatch.setattr(AIOKafkaProducer, method, raising_after(original, 1))
        if method == "begin_transaction":  # is not awaited for an answer, so it fails before the work
            monkeypatch.setattr(AIOKafkaProducer, method, failing_first(original))
        await delivery.finish(record, place)
    assert len(await worker.published(record.topic)) == 1
    assert await worker.committed() == OFFSET + 1


def failing_first(method: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    failed = False

    async def call(self: AIOKafkaProducer, *args: Any) -> None:
        nonlocal failed
        if not failed:
            failed = True
            raise KafkaConnectionError("the broker is away")
        await method(self, *args)

    return call


async def test_the_end_waits_for_a_broker_that_is_away(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    async with worker.delivery() as delivery:
        monkeypatch.setattr(AIOKafkaConsumer, "start", failing_first(AIOKafkaConsumer.start))
        place = await delivery.place(worker.record())
        await delivery.finish(worker.record(), place)
    assert len(await worker.published(worker.record().topic)) == 1


@pytest.mark.parametrize(
    ("key", "value", "headers", "kept"),
    [
        (None, None, (), (None, b"")),
        (b"k", b"x" * (kafka.MAX_MESSAGE_BYTES - 200), (), (b"k", b"x" * (kafka.MAX_MESSAGE_BYTES - 200))),
        (b"k", b"x" * (kafka.MAX_MESSAGE_BYTES + 1), (("h", b"v"),), (None, b"")),
        (b"k", b"v", (("h", b"x" * kafka.MAX_MESSAGE_BYTES),), (b"k", b"v")),
    ],
    ids=["nothing", "as large as may be", "too large", "headers too large"],
)
async def test_every_dead_letter_can_be_delivered(
    worker: Worker, key: bytes | None, value: bytes | None, headers: Any, kept: tuple[bytes | None, bytes]
) -> None:
    message = Message(worker.source.topic, 0, OFFSET, 0, key, value, headers)
    letter = dead_letter(message, NotARequest("no JSON"), worker.settings)
    async with worker.delivery() as delivery:
        await delivery.finish(letter, await delivery.place(letter))
    (found,) = await worker.published(letter.topic)
    assert (found.key, found.value) == kept
    assert header(found.headers, "kafka_dlt-original-offset") == str(OFFSET)


async def test_an_event_is_found_behind_a_transaction_that_is_still_open(worker: Worker) -> None:
    record = worker.record()
    async with worker.delivery() as delivery, kafka.started(kafka.producer(worker.settings, "another")) as other:
        place = await delivery.place(record)
        await other.begin_transaction()
        await other.send_and_wait(record.topic, b"of another job", partition=place.partition)
        async with kafka.started(kafka.producer(worker.settings)) as producer:
            await producer.send_and_wait(
                record.topic, record.value, key=record.key, partition=place.partition, headers=record.headers
            )
        looking = asyncio.create_task(delivery.is_published(record, place))
        done, _ = await asyncio.wait([looking], timeout=1.5)
        assert not done
        await other.commit_transaction()
        assert await looking


async def test_a_worker_that_lost_its_partition_stops(worker: Worker) -> None:
    async with worker.delivery() as delivery:
        record = worker.record()
        place = await delivery.place(record)
        worker.consumer.unsubscribe()
        with pytest.raises(PartitionLost):
            await delivery.finish(record, place)
    assert await worker.published(record.topic) == []


async def test_without_transactions_record_and_offset_still_arrive(worker_settings: Settings) -> None:
    settings = worker_settings.model_copy(update={"kafka_transactions": False})
    async with working(settings) as worker, worker.delivery() as delivery:
        record = worker.record()
        await delivery.finish(record, await delivery.place(record))
        assert len(await worker.published(record.topic)) == 1
        assert await worker.committed() == OFFSET + 1


async def test_a_dead_letter_keeps_every_byte(worker: Worker) -> None:
    value, headers = b"\xff\x00{", (("bin\u00e4r", b"\xfe\xff"), ("ce_id", b"theirs"))
    message = Message(worker.source.topic, 0, OFFSET, 1234, None, value, headers)
    letter = dead_letter(message, NotARequest("no JSON object"), worker.settings)
    async with worker.delivery() as delivery:
        await delivery.finish(letter, await delivery.place(letter))
    (found,) = await worker.published(worker.settings.topics.dead_letter)
    assert (found.key, found.value) == (None, value)
    assert tuple(found.headers[:2]) == headers
    assert header(found.headers, "kafka_dlt-original-offset") == "0"
    assert header(found.headers, "kafka_dlt-exception-message") == "no JSON object"


async def test_topics_are_created_as_designed_and_differences_are_named(
    worker_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    assert set(await kafka.ensure_topics(worker_settings)) == set(worker_settings.topics.all())
    caplog.clear()
    assert await kafka.ensure_topics(worker_settings) == []
    assert caplog.records == []
    await kafka.ensure_topics(worker_settings.model_copy(update={"kafka_request_partitions": 6}))
    assert "has 4 partitions, 6 are wanted" in caplog.text
