"""Every control there is: `train.control`, read from its beginning to its end and on, by each worker for itself.

Knows which control is for which run; must not act on any, which is the supervisor's.
"""

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaConnectionError, KafkaError, KafkaTimeoutError, UnknownTopicOrPartitionError

from mistudio_schemas import TrainControl, parse_event
from mistudio_train.errors import brief
from mistudio_train.settings import Settings

from . import kafka
from .backoff import backoff
from .run_record import ObeyedControl, ReadTo, RunRecord

NAME_CHARACTERS = 200
SILENT_SECONDS = 10.0
"""Without a control, after which the reader has to show that there is none: one whose broker died may never wake."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Control:
    """A control, and which record it is."""

    partition: int
    offset: int
    sent: int
    """The record's timestamp, in milliseconds since the epoch."""
    job_id: str
    run: int | None
    action: Literal["cancel", "stop"]
    requested_by: str | None = None

    @property
    def obeyed(self) -> ObeyedControl:
        """As a run's record keeps it."""
        return ObeyedControl(
            partition=self.partition, offset=self.offset, action=self.action, requested_by=self.requested_by
        )

    def is_for(self, record: RunRecord, asked: int, others: Iterable[RunRecord]) -> bool:
        """Whether it is for this run.

        One that names no run is for the unfinished run, or for the first that begins later, and for one only: never
        for a run that was asked for after it, once the job has had an end.

        Args:
            record: of the run.
            asked: when its request was published, in milliseconds since the epoch.
            others: the job's other runs.

        """
        if self.run is not None:
            return self.run == record.run
        others = list(others)
        if any(self.obeyed.is_same(done) for other in others for done in other.controls):
            return False
        ends = [(other.controls_until, end) for other in others if (end := other.ended_at) is not None]
        if not ends:
            return True
        if any(other.message == record.message for other in others):
            # the group was set back: when, nobody has noted
            is_later = self._is_after(record.controls_before, record.created_at)
        else:
            is_later = self.sent >= asked
        return is_later and all(self._is_after(*end) for end in ends)

    def _is_after(self, read: ReadTo | None, moment: int) -> bool:
        """By what a worker had read at that moment, for clocks differ; by the clock where that was not noted."""
        if read is None or self.partition not in read:
            return self.sent >= moment
        return self.offset >= read[self.partition]


class Controls:
    """The controls by job, kept up to date.

    Args:
        on_control: told of each control that is sent while the worker runs.

    """

    def __init__(self, settings: Settings, on_control: Callable[[Control], None]) -> None:
        self._settings, self._on_control = settings, on_control
        self._of_job: dict[str, list[Control]] = defaultdict(list)
        self._next: dict[TopicPartition, int] = {}
        self._asking: AIOKafkaConsumer | None = None
        """Beside the reader, which answers no question while it waits for controls."""
        self._moved = asyncio.Condition()
        self._live = False

    @property
    def read_to(self) -> ReadTo:
        """How far they have been read."""
        return {place.partition: offset for place, offset in self._next.items()}

    def of(self, job_id: str) -> list[Control]:
        """Of the job, in the order they were sent."""
        return list(self._of_job.get(job_id, ()))

    async def follow(self) -> None:
        """Read on for ever; a broker that is away is waited for."""
        waits = backoff()
        while True:
            try:
                async with (
                    kafka.started(kafka.reader(self._settings)) as consumer,
                    kafka.started(kafka.reader(self._settings)) as asking,
                ):
                    await self._begin(consumer)
                    self._asking = asking
                    waits = backoff()
                    while True:
                        await self._read(consumer)
            except Exception as error:  # a reader whose broker dies may fail in many ways
                delay = next(waits)
                trace = not isinstance(error, (KafkaError, OSError))
                logger.warning(
                    "controls cannot be read (%s); again in %.0f s", type(error).__name__, delay, exc_info=trace
                )
                await asyncio.sleep(delay)
            finally:
                self._asking = None

    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        """What is there by now.

        Raises:
            KafkaTimeoutError: if there is something, and this reader does not bring it.

        """
        deadline = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < deadline:
            records = await consumer.getmany(timeout_ms=1000)
            for some in records.values():
                self._take(some)
            for place in consumer.assignment():
                # not the last record's: behind it there may be the marker of a transaction
                self._next[place] = await consumer.position(place)
            async with self._moved:
                self._moved.notify_all()
            if records:
                return
        if not self._is_read_to(await self._ends()):
            raise KafkaTimeoutError("the reader has fallen asleep")

    def _is_read_to(self, ends: dict[TopicPartition, int]) -> bool:
        return all(self._next.get(where, 0) >= end for where, end in ends.items())

    async def caught_up(self) -> None:
        """Until every control that was sent before this call has been read."""
        ends = await self._ends()
        async with self._moved:
            await self._moved.wait_for(lambda: self._is_read_to(ends))
        self._live = True

    async def partitions_of(self, topic: str) -> list[int]:
        """The partitions that a topic has now.

        Raises:
            KafkaError: if the broker does not say.

        """
        if self._asking is None:
            raise KafkaConnectionError("the broker is away")
        return await _partitions_of(topic, self._asking)

    async def _ends(self) -> dict[TopicPartition, int]:
        for delay in backoff((0.1, 0.5, 1.0)):
            if (asking := self._asking) is not None:
                with contextlib.suppress(KafkaError, OSError):  # `follow` says so, and begins again
                    ends: dict[TopicPartition, int] = await asking.end_offsets(list(self._next))
                    return ends
            await asyncio.sleep(delay)
        raise AssertionError("backoff has no end")

    async def _begin(self, consumer: AIOKafkaConsumer) -> None:
        topic = self._settings.topics.control
        places = [TopicPartition(topic, number) for number in await _partitions_of(topic, consumer)]
        consumer.assign(places)
        for place, begin in (await consumer.beginning_offsets(places)).items():
            self._next[place] = max(begin, self._next.get(place, 0))
            consumer.seek(place, self._next[place])

    def _take(self, records: list[ConsumerRecord]) -> None:
        for record in records:
            control = read(record)
            if control is not None:
                self._of_job[control.job_id].append(control)
                if self._live:
                    self._on_control(control)
            self._next[TopicPartition(record.topic, record.partition)] = record.offset + 1


async def _partitions_of(topic: str, consumer: AIOKafkaConsumer) -> list[int]:
    numbers = (await consumer._client.fetch_all_metadata()).partitions_for_topic(topic)
    if not numbers:  # it is not shown to this worker, or not yet
        raise UnknownTopicOrPartitionError(topic)
    return sorted(numbers)


def read(record: ConsumerRecord) -> Control | None:
    """The control in a record; `None`, and a line in the log, for what is none."""
    try:
        event = parse_event(record.value or b"", record.headers)
        if not isinstance(event, TrainControl):
            raise ValueError(f"{type(event).__name__} is no control")
    except (ValueError, RecursionError) as error:
        place = f"{record.topic}-{record.partition}@{record.offset}"
        logger.warning("%s is no control, and nobody obeys it: %s", place, type(error).__name__)
        return None
    return Control(
        record.partition,
        record.offset,
        record.timestamp,
        event.job_id,
        event.run,
        event.action,
        brief(event.requested_by, NAME_CHARACTERS) if event.requested_by else None,
    )
