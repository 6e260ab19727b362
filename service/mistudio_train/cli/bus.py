"""The command line's side of Kafka: send events, read a job's story.

Imported inside commands only, as Kafka's client is slow to load; shows nothing to anybody.
"""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError
from aiokafka.partitioner import DefaultPartitioner

from mistudio_schemas import (
    TrainCancelled,
    TrainCompleted,
    TrainControl,
    TrainFailed,
    TrainProgress,
    TrainRequested,
    parse_event,
    record_for,
)
from mistudio_train.settings import Settings
from mistudio_train.worker import kafka
from mistudio_train.worker.outcome import ENDED, last_status

from . import group
from .errors import CliError

logger = logging.getLogger(__name__)

Terminal = TrainCompleted | TrainFailed | TrainCancelled
StatusEvent = TrainProgress | Terminal
SOURCE = "/mistudio-train/cli"
CLOCKS_APART_MS = 3_600_000
"""That the clocks of two workers may differ."""


@contextmanager
def reaching_kafka(settings: Settings) -> Iterator[None]:
    """Turn what a Kafka client raises into a sentence.

    Raises:
        CliError: if the broker does not answer, refuses, or lacks a topic.

    """
    try:
        yield
    except UnknownTopicOrPartitionError:
        raise CliError(
            f"Kafka at {settings.kafka_bootstrap_servers} has no topic {settings.topics.requested}, or another of ours",
            "Create them with `mistudio-train init`, or correct KAFKA_TOPIC_PREFIX.",
        ) from None
    except (KafkaError, OSError) as error:
        raise CliError(
            f"Kafka at {settings.kafka_bootstrap_servers} cannot be used ({type(error).__name__})",
            "Start it, or correct KAFKA_BOOTSTRAP_SERVERS and the other KAFKA_ settings.",
        ) from None


async def submit(settings: Settings, request: TrainRequested) -> None:
    """Publish the job's first status and then the request, so that no worker's status is written over.

    Raises:
        KafkaError: if either is not acknowledged.

    """
    assert request.job_id is not None  # the command has made one
    async with kafka.started(kafka.producer(settings)) as producer:
        await require_topics(producer.client, [settings.topics.progress, settings.topics.requested])
        waiting = await group.waiting(settings, await producer.partitions_for(settings.topics.requested))
        await send(producer, settings, queued(request.job_id))
        await send(producer, settings, request, group.emptiest(waiting))


async def tell(settings: Settings, control: TrainControl, status: TrainProgress | None) -> None:
    """Publish a control and then, if there is one, the status that it brings about: never a status without its control.

    Raises:
        KafkaError: if either is not acknowledged.

    """
    async with kafka.started(kafka.producer(settings)) as producer:
        await require_topics(producer.client, [settings.topics.progress, settings.topics.control])
        await send(producer, settings, control)
        if status is not None:
            await send(producer, settings, status)


def queued(job_id: str) -> TrainProgress:
    """A job's status before any worker knows of it."""
    return TrainProgress(job_id=job_id, status="queued", message="waiting for a worker")


async def send(
    producer: AIOKafkaProducer,
    settings: Settings,
    event: TrainRequested | TrainProgress | TrainControl,
    partition: int | None = None,
) -> None:
    """Send one event and await its acknowledgement; `None`: to its key's partition."""
    record = record_for(event, source=SOURCE, topics=settings.topics)
    await producer.send_and_wait(**record.as_dict(), partition=partition)


@dataclass
class Story:
    """What is known of a job: its latest status and its end.

    Args:
        run: listen to this run only; `None`: to the newest.

    """

    job_id: str
    run: int | None = None
    progress: TrainProgress | None = None
    last_end: Terminal | None = None

    def hear(self, event: StatusEvent) -> bool:
        """Take an event in; whether it is about this job and run."""
        if event.job_id != self.job_id or (self.run is not None and event.run != self.run):
            return False
        if isinstance(event, TrainProgress):
            self.progress = event
        elif self.last_end is None or (event.run or 0) >= (self.last_end.run or 0):
            self.last_end = event
        return True

    @property
    def end(self) -> Terminal | None:
        """The end of the newest run, if it has ended."""
        end, progress = self.last_end, self.progress
        if end is None or progress is None:
            return end
        if progress.run is None:  # submitted again, or for the first time: only the clocks can tell
            return end if end.time >= progress.time else None
        return end if (end.run or 0) >= progress.run else None

    @property
    def status(self) -> TrainProgress | None:
        """How the job stands; `None`: unknown. A worker that dies with the job's end may not have said so."""
        if self.end is None or (self.progress is not None and self.progress.status == self.end.status):
            return self.progress
        return last_status(self.end)


async def latest_statuses(settings: Settings) -> list[TrainProgress]:
    """The latest status of every job, the newest first.

    Raises:
        KafkaError: if the topics cannot be read.

    """
    told: dict[str, Story] = {}
    going_on: dict[str, int] = {}
    async with reading(settings, [settings.topics.progress]) as consumer:
        async for record in to_the_end(consumer):
            event = _status_in(record)
            if isinstance(event, TrainProgress):
                told.setdefault(event.job_id, Story(event.job_id)).hear(event)
                if event.status in ENDED:
                    going_on.pop(event.job_id, None)
                else:
                    going_on[event.job_id] = record.timestamp
    if going_on:
        await _hear_ends(settings, told, since=min(going_on.values()) - CLOCKS_APART_MS)
    statuses = [story.status for story in told.values()]
    return sorted(filter(None, statuses), key=lambda status: status.time, reverse=True)


async def _hear_ends(settings: Settings, told: dict[str, Story], since: int) -> None:
    """Of the jobs that seem to go on some may have ended; `since`: milliseconds since the epoch."""
    topics = settings.topics
    async with reading(settings, [topics.completed, topics.failed, topics.cancelled]) as consumer:
        found = await consumer.offsets_for_times(dict.fromkeys(consumer.assignment(), since))
        starts = {where: at.offset for where, at in found.items() if at is not None}
        consumer.assign(list(starts))
        for where, offset in starts.items():
            consumer.seek(where, offset)
        async for record in to_the_end(consumer):
            event = _status_in(record)
            if event is not None and event.job_id in told:
                told[event.job_id].hear(event)


async def follow(settings: Settings, job_id: str, run: int | None = None) -> AsyncGenerator[StatusEvent | None]:
    """How the job stands now (`None`: nobody has heard of it), then each event until its end, which comes last.

    Raises:
        KafkaError: if the topics cannot be read.

    """
    story, topics = Story(job_id, run), settings.topics
    names = [topics.progress, topics.completed, topics.failed, topics.cancelled]
    async with reading(settings, names, progress_of=job_id) as consumer:
        async for record in to_the_end(consumer):
            if record.key == job_id.encode() and (event := _status_in(record)) is not None:
                story.hear(event)
        yield story.end or story.progress
        while story.end is None:
            record = await consumer.getone()
            event = _status_in(record)
            if event is not None and story.hear(event):
                yield event


async def standing(settings: Settings, job_id: str) -> StatusEvent | None:
    """How the job's newest run stands now; `None`: nobody has heard of the job.

    Raises:
        KafkaError: if the topics cannot be read.

    """
    async with aclosing(follow(settings, job_id)) as events:
        return await anext(events)


async def stories(settings: Settings, job_ids: Iterable[str]) -> dict[str, Story]:
    """What is known of each of these jobs.

    Raises:
        KafkaError: if the topics cannot be read.

    """
    told, topics = {job_id: Story(job_id) for job_id in job_ids}, settings.topics
    async with reading(settings, [topics.progress, topics.completed, topics.failed, topics.cancelled]) as consumer:
        async for record in to_the_end(consumer):
            story = told.get((record.key or b"").decode(errors="replace"))
            if story is not None and (event := _status_in(record)) is not None:
                story.hear(event)
    return told


@asynccontextmanager
async def reading(
    settings: Settings, topics: list[str], progress_of: str | None = None
) -> AsyncIterator[AIOKafkaConsumer]:
    """A consumer at the beginning of the topics, outside every group.

    Args:
        progress_of: of the progress topic, which is large, read only the partition that this job's key goes to.

    """
    reader = kafka.reader(settings)
    reader.subscribe(topics)
    async with kafka.started(reader) as consumer:
        found = consumer.assignment()
        consumer.unsubscribe()  # what is assigned by hand stays as it is when the cluster changes
        consumer.assign(_that_matter(found, settings.topics.progress, progress_of) if progress_of else list(found))
        await consumer.seek_to_beginning()
        yield consumer


async def to_the_end(consumer: AIOKafkaConsumer) -> AsyncIterator[Any]:
    """The records that are there now."""
    ends = await consumer.end_offsets(list(consumer.assignment()))
    waiting = set(ends)
    while waiting := {partition for partition in waiting if await consumer.position(partition) < ends[partition]}:
        for records in (await consumer.getmany(*waiting, timeout_ms=500)).values():
            for record in records:
                yield record


def _that_matter(found: frozenset[TopicPartition], progress: str, job_id: str) -> list[TopicPartition]:
    numbers = sorted(where.partition for where in found if where.topic == progress)
    own = TopicPartition(progress, DefaultPartitioner()(job_id.encode(), numbers, numbers))
    return [where for where in found if where.topic != progress or where == own]


def _status_in(record: Any) -> StatusEvent | None:
    """The record's event; `None` for a tombstone, and for what another version or a stranger wrote."""
    if record.value is None:
        return None
    try:
        event = parse_event(record.value, record.headers)
    except ValueError as error:
        logger.info("%s-%d@%d is passed over: %s", record.topic, record.partition, record.offset, error)
        return None
    return event if isinstance(event, TrainProgress | TrainCompleted | TrainFailed | TrainCancelled) else None


async def require_topics(client: Any, topics: Iterable[str]) -> None:
    """Raise UnknownTopicOrPartitionError at once for a missing topic, where a send would wait for a minute."""
    existing = (await client.fetch_all_metadata()).topics()
    if missing := [topic for topic in topics if topic not in existing]:
        raise UnknownTopicOrPartitionError(", ".join(missing))
