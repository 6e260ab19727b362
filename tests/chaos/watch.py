"""Follows the topics while everything dies: which job is where by now, and which jobs have ended."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiokafka import ConsumerRecord

from mistudio_schemas import TrainCancelled, TrainCompleted, TrainFailed, TrainProgress, parse_event
from mistudio_train.settings import Settings
from mistudio_train.worker import kafka

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
SILENT_SECONDS = 8.0
"""A reader that has read nothing for so long is replaced: one that loses its broker while it begins may never wake."""


@dataclass
class Watch:
    """What the topics have said so far."""

    progress: dict[str, list[TrainProgress]] = field(default_factory=dict)
    """By job."""
    ends: dict[str, list[TrainCompleted | TrainFailed | TrainCancelled]] = field(default_factory=dict)
    """By job; each record counts once, also if it is read again."""
    _seen: set[tuple[str, int, int]] = field(default_factory=set)
    _moved: asyncio.Condition = field(default_factory=asyncio.Condition)

    def phase_of(self, worker: str) -> tuple[str, str]:
        """The worker's job and that job's phase; nothing if it has none."""
        latest = [events[-1] for events in self.progress.values() if events[-1].worker == worker]
        under_way = [event for event in latest if event.phase not in ("ended", None) and event.job_id not in self.ends]
        newest = max(under_way, key=lambda event: event.time, default=None)
        return ("", "idle") if newest is None else (newest.job_id, str(newest.phase))

    async def ended(self, jobs: set[str], seconds: float) -> None:
        """Until all of these have ended."""
        async with asyncio.timeout(seconds), self._moved:
            await self._moved.wait_for(lambda: jobs <= set(self.ends))

    async def attempt_beyond(self, job: str, attempt: int, seconds: float = 120) -> TrainProgress:
        """Until another attempt than this one has spoken, or ended the job."""

        def there() -> TrainProgress | None:
            return next((one for one in self.progress.get(job, []) if (one.attempt or 0) > attempt), None)

        async with asyncio.timeout(seconds), self._moved:
            await self._moved.wait_for(lambda: there() is not None)
            found = there()
            assert found is not None  # nobody else has run meanwhile
            return found

    async def take(self, record: ConsumerRecord) -> None:
        """One record more."""
        place = (record.topic, record.partition, record.offset)
        if place in self._seen or record.value is None:
            return
        self._seen.add(place)
        event = parse_event(record.value, record.headers)
        async with self._moved:
            if isinstance(event, TrainProgress):
                self.progress.setdefault(event.job_id, []).append(event)
            elif isinstance(event, TrainCompleted | TrainFailed | TrainCancelled):
                self.ends.setdefault(event.job_id, []).append(event)
            self._moved.notify_all()


@asynccontextmanager
async def watching(settings: Settings) -> AsyncIterator[Watch]:
    """A watch that follows the topics until the block ends."""
    watch = Watch()
    task = asyncio.create_task(_follow(settings, watch))
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _follow(settings: Settings, watch: Watch) -> None:
    topics = settings.topics
    while True:
        try:
            async with kafka.started(kafka.reader(settings)) as consumer:
                consumer.subscribe([topics.progress, topics.completed, topics.failed, topics.cancelled])
                silent_since = time.monotonic()
                while time.monotonic() - silent_since < SILENT_SECONDS:
                    for records in (await consumer.getmany(timeout_ms=1000)).values():
                        silent_since = time.monotonic()
                        for record in records:
                            await watch.take(record)
        except Exception as error:  # a reader whose broker dies may fail in many ways
            logger.info("the watch begins again: %r", error)
            await asyncio.sleep(RETRY_SECONDS)
