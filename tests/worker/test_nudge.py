"""What an idle slot sees of the group's backlog, on a real Kafka, and when it asks for a rebalance."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaConnectionError

from mistudio_train.settings import Settings
from mistudio_train.worker import kafka, nudge
from mistudio_train.worker.metrics import Metrics
from mistudio_train.worker.nudge import Nudge, read_backlog

TOPIC = "train.requested"


def part(number: int) -> TopicPartition:
    return TopicPartition(TOPIC, number)


async def send(settings: Settings, topic: str, *partitions: int, transactional_id: str | None = None) -> None:
    async with kafka.started(kafka.producer(settings, transactional_id)) as producer:
        assert isinstance(producer, AIOKafkaProducer)
        if transactional_id:
            async with producer.transaction():
                await send_each(producer, topic, *partitions)
        else:
            await send_each(producer, topic, *partitions)


async def send_each(producer: AIOKafkaProducer, topic: str, *partitions: int) -> None:
    for partition in partitions:
        await producer.send_and_wait(topic, b"{}", partition=partition)


async def test_the_backlog_is_what_nobody_has_committed(worker_settings: Settings) -> None:
    settings, topic = worker_settings, worker_settings.topics.requested
    await kafka.ensure_topics(settings)
    await send(settings, topic, 0, 0, 0, 1)
    consumer = AIOKafkaConsumer(
        topic,
        **kafka.client_options(settings),
        group_id=settings.kafka_group_id,
        enable_auto_commit=False,
        auto_offset_reset="latest",
    )
    every = [TopicPartition(topic, number) for number in range(4)]
    async with kafka.started(consumer):
        await consumer.seek_to_beginning(*every)
        await consumer.commit({every[0]: 1})
        assert await read_backlog(consumer, every) == {every[0]: 2, every[1]: 1}
        await consumer.seek_to_end(*every)
        # our own messages are no backlog once we have them, committed or not
        assert await read_backlog(consumer, every) == {}


async def test_markers_of_transactions_are_no_work_of_our_own(worker_settings: Settings) -> None:
    settings, topic = worker_settings, worker_settings.topics.requested
    await kafka.ensure_topics(settings)
    await send(settings, topic, 0, transactional_id=f"{topic}-upstream")
    consumer = AIOKafkaConsumer(
        topic,
        **kafka.client_options(settings),
        group_id=settings.kafka_group_id,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    where = TopicPartition(topic, 0)
    async with kafka.started(consumer):
        await consumer.getone()
        await consumer.commit({where: 1})
        polling = asyncio.create_task(consumer.getone())
        async with asyncio.timeout(20):
            while await read_backlog(consumer, [where]):  # noqa: ASYNC110 - the consumer passes markers when it polls
                await asyncio.sleep(0.02)
        polling.cancel()
        await asyncio.gather(polling, return_exceptions=True)


@dataclass
class Slot:
    number: int = 0
    assigned: frozenset[TopicPartition] = frozenset({part(4)})
    busy: TopicPartition | None = None
    begun: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class Assignor:
    shares: list[frozenset[TopicPartition]] | None = None
    asked: list[dict[TopicPartition, int]] = field(default_factory=list)

    def ask(self, waiting: dict[TopicPartition, int]) -> None:
        self.asked.append(waiting)


@dataclass
class Consumer:
    """Counts how often it was made to rejoin."""

    rejoined: int = 0

    @property
    def _coordinator(self) -> Any:
        return self

    def request_rejoin(self) -> None:
        self.rejoined += 1


@dataclass
class Group:
    """A slot that owns partition 4 in a group whose other member owns 0 and 1."""

    monkeypatch: pytest.MonkeyPatch
    backlog: dict[TopicPartition, int] = field(default_factory=lambda: {part(0): 1, part(1): 1})
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.slot, self.consumer = Slot(), Consumer()
        self.assignor = Assignor([frozenset({part(0), part(1)}), frozenset({part(4)})])
        self.metrics = Metrics()
        self.nudge = Nudge(self.slot, self.assignor, lambda: self.consumer, self.metrics)  # type: ignore[arg-type]
        self.monkeypatch.setattr(nudge, "read_backlog", self.read)
        self.monkeypatch.setattr(time, "monotonic", lambda: self.now)

    async def read(self, consumer: Consumer, partitions: frozenset[TopicPartition]) -> dict[TopicPartition, int]:
        assert partitions == {part(0), part(1), part(4)}
        return dict(self.backlog)

    async def look(self) -> bool:
        return await self.nudge._look()


async def test_a_slot_that_sees_waiting_work_says_so_and_rejoins(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch)
    assert await group.look()
    assert (group.assignor.asked, group.consumer.rejoined) == ([group.backlog], 1)
    assert b"mistudio_nudges_total 1.0" in nudges(group)


def nudges(group: Group) -> bytes:
    from prometheus_client import generate_latest

    return generate_latest(group.metrics.registry)


async def test_a_nudge_that_brought_nothing_is_repeated_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    group, asked = Group(monkeypatch), []
    for second in range(1000):
        group.now = 1000.0 + second
        if await group.look():
            asked.append(second)
    assert asked == [0, 1, 6, 36, 156, 756]


async def test_new_work_is_not_held_up_by_earlier_nudges(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch)
    assert await group.look()
    assert not await group.look()
    group.backlog[part(1)] += 1
    assert await group.look()


async def test_nobody_nudges_without_knowing_the_shares_or_with_work_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = Group(monkeypatch)
    group.slot.busy = part(4)
    assert not await group.look()
    group.slot.busy, group.backlog = None, group.backlog | {part(4): 1}
    assert not await group.look()
    group.assignor.shares = None
    assert not await group.look()
    assert group.consumer.rejoined == 0


async def test_a_broker_that_does_not_answer_ends_no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    group, looked = Group(monkeypatch), asyncio.Event()
    tries = 0

    async def read(*_: object) -> dict[TopicPartition, int]:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise KafkaConnectionError
        if tries == 2:
            raise AttributeError("a defect")
        looked.set()
        return {}

    monkeypatch.undo()
    monkeypatch.setattr(nudge, "read_backlog", read)
    monkeypatch.setattr(nudge, "LOOK_SECONDS", (0.0, 0.01))
    monkeypatch.setattr(nudge, "DEFECT_SECONDS", 0.0)
    group.slot.idle.set()
    watch = asyncio.create_task(group.nudge.watch())
    await asyncio.wait_for(looked.wait(), 10)
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
