"""For tests: a worker's application that runs, a client that publishes to it, and a reader of what it says."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRecord

from mistudio_schemas import Contract, TrainRequested, parse_event, record_for
from mistudio_train.settings import Settings
from mistudio_train.worker import kafka
from mistudio_train.worker.app import build_app
from mistudio_train.worker.assignor import BusyAwareAssignor
from mistudio_train.worker.child_main import Job, train


@asynccontextmanager
async def running_worker(
    settings: Settings, job: Job = train, assignor: Callable[[Any], Any] = BusyAwareAssignor
) -> AsyncIterator[None]:
    """The worker, from when it has joined its group until the block ends; its HTTP port is not served."""
    app, started = build_app(settings, job, assignor), asyncio.Event()
    app.after_startup(started.set)
    async with app.start_lifespan_context():
        await started.wait()
        yield


def request(job_id: str, settings: Settings, *, partition: int | None = None, **fields: Any) -> dict[str, Any]:
    """One for the worker's own corpus, to be published."""
    asked = TrainRequested.model_validate({"model_name": "m", "corpus_file": "corpus.txt", "job_id": job_id} | fields)
    record: dict[str, Any] = record_for(asked, source="/test", topics=settings.topics).as_dict()
    return record if partition is None else record | {"partition": partition}


async def publish(settings: Settings, *records: dict[str, Any]) -> None:
    """Send records, each with the keyword arguments of aiokafka's `send`."""
    await kafka.ensure_topics(settings)
    async with kafka.started(kafka.producer(settings)) as producer:
        for record in records:
            await producer.send_and_wait(**record)


class Reader:
    """Reads topics from their beginning, committed records only, and keeps all."""

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        self._consumer = consumer
        self.records: list[ConsumerRecord] = []

    async def until(self, enough: Callable[[list[ConsumerRecord]], bool], seconds: float = 120) -> list[ConsumerRecord]:
        """Read on until the records are enough."""
        async with asyncio.timeout(seconds):
            while not enough(self.records):
                self.records.append(await self._consumer.getone())
        return self.records

    async def of(self, topic: str, count: int, seconds: float = 120) -> list[ConsumerRecord]:
        """The first `count` records of one topic."""

        def there() -> list[ConsumerRecord]:
            return [record for record in self.records if record.topic == topic]

        await self.until(lambda _: len(there()) >= count, seconds)
        return there()

    async def drained(self) -> list[ConsumerRecord]:
        """Everything that is there by now."""
        ends = await self._consumer.end_offsets(self._consumer.assignment())
        for partition, end in ends.items():
            while await self._consumer.position(partition) < end:
                batch = await self._consumer.getmany(timeout_ms=200)
                self.records += [record for records in batch.values() for record in records]
        return self.records


@asynccontextmanager
async def reading(settings: Settings, *topics: str) -> AsyncIterator[Reader]:
    """A reader of these topics, which are created if missing."""
    await kafka.ensure_topics(settings)
    consumer = AIOKafkaConsumer(
        *topics,
        **kafka.client_options(settings),
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        max_partition_fetch_bytes=kafka.MAX_MESSAGE_BYTES,
    )
    async with kafka.started(consumer):
        yield Reader(consumer)


def events(records: list[ConsumerRecord]) -> list[Contract]:
    """The events in records."""
    return [parse_event(record.value, record.headers) for record in records]
