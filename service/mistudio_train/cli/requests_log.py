"""The requests that lie in `train.requested`: finds those that are meant, and publishes them again.

Changes no offset and judges no bytes itself: what a message is, the worker's `intake` says.
"""

import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import uuid4

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from mistudio_schemas import KafkaRecord, Limits, read_object
from mistudio_train.settings import Settings
from mistudio_train.worker import kafka
from mistudio_train.worker.intake import Intake, Message, NotARequest, read
from mistudio_train.worker.records import read_any_header_name, sendable

from . import bus, group
from .errors import CliError

NOT_REPEATED = ("ce_id", "ce_time", "traceparent", "tracestate")
"""Headers that say which sending of the request it is."""


@dataclass(frozen=True)
class Selection:
    """Which messages are meant: of jobs, the newest request each; else all from somewhere on."""

    jobs: tuple[str, ...] = ()
    since: int | None = None
    """Milliseconds since the epoch."""
    offsets: Mapping[int, int] = field(default_factory=dict)
    """Partition to its first offset that is meant; no other partition is."""
    until: int | None = None
    """Milliseconds since the epoch, itself included."""
    last_offsets: Mapping[int, int] = field(default_factory=dict)
    """Partition to its last offset that is meant, itself included."""

    def ends_before(self, message: Message) -> bool:
        """Whether the message comes after all that are meant in its partition."""
        late = self.until is not None and message.timestamp > self.until
        return late or message.offset > self.last_offsets.get(message.partition, message.offset)


@dataclass(frozen=True)
class Chosen:
    """A message that is meant, and what it is."""

    message: Message
    intake: Intake | None
    """`None`: no request."""
    why_not: str = ""
    """Why it cannot be run again."""

    @property
    def job_id(self) -> str | None:
        """Of a request."""
        return self.intake.job_id if self.intake is not None else None

    def is_of(self, job: str) -> bool:
        """Whether the job is asked for here, by its id or at least by the message's key."""
        return job in (self.job_id, (self.message.key or b"").decode(errors="replace"))


@dataclass(frozen=True)
class Found:
    """The messages that are meant, oldest first, and where each partition of the topic begins."""

    chosen: list[Chosen]
    begins: dict[int, int]

    @property
    def places(self) -> dict[int, int]:
        """Partition to the first offset that is meant there."""
        return {one.message.partition: one.message.offset for one in sorted(self.chosen, key=_offset, reverse=True)}


async def find(settings: Settings, selection: Selection) -> Found:
    """The messages that are meant.

    Raises:
        CliError: for a partition or an offset that is not there.
        KafkaError: if the topic cannot be read.

    """
    read_any_header_name()
    async with bus.reading(settings, [settings.topics.requested]) as consumer:
        begins = await consumer.beginning_offsets(list(consumer.assignment()))
        starts = await _starts(consumer, selection, begins, settings.topics.requested)
        if not starts:
            return Found([], _by_number(begins))
        consumer.assign(list(starts))
        for place, offset in starts.items():
            consumer.seek(place, offset)
        newest: dict[str, Chosen] = {}
        chosen: list[Chosen] = []
        async for record in bus.to_the_end(consumer):
            one = _judged(record, settings.limits)
            if not selection.jobs:
                chosen += [] if selection.ends_before(one.message) else [one]
            for job in filter(one.is_of, selection.jobs):
                newest[job] = max(newest.get(job, one), one, key=_preference)
    meant = {one.message.place: one for one in (*chosen, *newest.values())}
    return Found(sorted(meant.values(), key=_age), _by_number(begins))


async def publish_again(settings: Settings, requests: list[Chosen]) -> AsyncGenerator[str]:
    """Send each request once more, after a `queued` status of its job; its place, once it is acknowledged.

    Raises:
        KafkaError: if one is not acknowledged; those before it were.

    """
    topics = settings.topics
    async with kafka.started(kafka.producer(settings)) as producer:
        await bus.require_topics(producer.client, [topics.progress, topics.requested])
        waiting = await group.waiting(settings, await producer.partitions_for(topics.requested))
        for one in requests:
            record = repeated(one)
            await bus.send(producer, settings, bus.queued(str(one.job_id)))
            sent = await producer.send_and_wait(**record.as_dict(), partition=group.emptiest(waiting))
            yield f"{sent.topic}-{sent.partition}@{sent.offset}"


def repeated(one: Chosen) -> KafkaRecord:
    """The same request as a new message: byte for byte, but for an id that only the old place told."""
    message, job_id = one.message, str(one.job_id)
    value = message.value or b""
    raw = read_object(value)
    if raw.get("job_id") is None:
        value = json.dumps(raw | {"job_id": job_id}, ensure_ascii=False).encode()
    headers = [(sendable(name), content) for name, content in message.headers if name not in NOT_REPEATED]
    if any(name.startswith("ce_") for name, _ in headers):  # a CloudEvent; a raw message does not become one
        headers += [("ce_id", str(uuid4()).encode()), ("ce_time", datetime.now(UTC).isoformat().encode())]
    return KafkaRecord(message.topic, message.key or job_id.encode(), value, headers)


async def _starts(
    consumer: AIOKafkaConsumer, selection: Selection, begins: Mapping[TopicPartition, int], topic: str
) -> dict[TopicPartition, int]:
    if selection.since is not None:
        found = await consumer.offsets_for_times(dict.fromkeys(begins, selection.since))
        return {place: at.offset for place, at in found.items() if at is not None}
    starts = {TopicPartition(topic, partition): offset for partition, offset in selection.offsets.items()}
    if not starts:
        return dict(begins)
    ends = await consumer.end_offsets([place for place in starts if place in begins])
    for place, offset in starts.items():
        if place not in ends:
            raise CliError(f"{topic} has no partition {place.partition}", f"It has 0 to {len(begins) - 1}.")
        if not begins[place] <= offset < ends[place]:
            there = f"from {begins[place]} to {ends[place] - 1}" if begins[place] < ends[place] else "empty"
            raise CliError(f"{topic}-{place.partition} has no offset {offset}", f"The partition is {there}.")
    return starts


def _judged(record: ConsumerRecord, limits: Limits) -> Chosen:
    message = Message(
        record.topic, record.partition, record.offset, record.timestamp, record.key, record.value, tuple(record.headers)
    )
    try:
        intake = read(message, limits)
    except NotARequest as error:
        return Chosen(message, None, f"no request: {error}")
    given = read_object(message.value or b"").get("job_id")
    if given is not None and given != intake.job_id:
        return Chosen(message, intake, "its job_id cannot be one")  # elsewhere it would get another id
    return Chosen(message, intake)


def _preference(one: Chosen) -> tuple[bool, int, int]:
    """Of a job's messages: a request before what is none, then the newest."""
    return (not one.why_not, one.message.timestamp, one.message.offset)


def _age(one: Chosen) -> tuple[int, int, int]:
    return (one.message.timestamp, one.message.partition, one.message.offset)


def _offset(one: Chosen) -> int:
    return one.message.offset


def _by_number(offsets: Mapping[TopicPartition, int]) -> dict[int, int]:
    return {place.partition: offset for place, offset in offsets.items()}
