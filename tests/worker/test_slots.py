"""A slot that is told to stop begins no other job, and none while the group shares out its partitions."""

import asyncio
from typing import Any

from aiokafka import ConsumerRecord, TopicPartition

from mistudio_train.settings import Settings
from mistudio_train.worker.metrics import Metrics
from mistudio_train.worker.slots import Slot

PARTITION = TopicPartition("train.requested", 0)


class Group:
    """A consumer that keeps its partition."""

    def assignment(self) -> frozenset[TopicPartition]:
        return frozenset({PARTITION})


class Supervisor:
    """Works on every message until it is cancelled."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.begun = asyncio.Event()

    async def handle(self, message: Any, deliveries: Any, orders: Any) -> None:
        self.said.append(f"begins {message.offset}")
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.said.append(f"gives back {message.offset}")


def record(offset: int, partition: int = 0) -> ConsumerRecord:
    return ConsumerRecord(PARTITION.topic, partition, offset, 0, 0, None, b"{}", None, 0, 0, ())


def slot_of(supervisor: Any) -> Slot:
    ready = asyncio.Event()
    ready.set()
    return Slot(0, Settings(), supervisor, Metrics(), ready)


async def test_a_stopped_slot_gives_its_job_back_and_passes_by_what_follows() -> None:
    supervisor, group = Supervisor(), Group()
    slot = slot_of(supervisor)
    handler = asyncio.create_task(slot.on_message(record(5), group))  # type: ignore[arg-type]
    await supervisor.begun.wait()
    await slot.stop(0.01)
    await handler
    await slot.on_message(record(6), group)  # type: ignore[arg-type]
    assert supervisor.said == ["begins 5", "gives back 5"]


async def test_a_job_whose_partition_is_gone_stops_and_the_slot_goes_on() -> None:
    supervisor, group = Supervisor(), Group()
    slot = slot_of(supervisor)
    handler = asyncio.create_task(slot.on_message(record(5), group))  # type: ignore[arg-type]
    await supervisor.begun.wait()
    await slot.on_partitions_assigned([TopicPartition("train.requested", 1)])
    await handler
    supervisor.begun.clear()
    handler = asyncio.create_task(slot.on_message(record(6), group))  # type: ignore[arg-type]
    await supervisor.begun.wait()
    await slot.stop(0.01)
    await handler
    assert supervisor.said == ["begins 5", "gives back 5", "begins 6", "gives back 6"]


async def test_a_message_handed_over_during_a_rebalance_begins_after_it_if_it_is_still_ours() -> None:
    supervisor, group = Supervisor(), Group()
    slot = slot_of(supervisor)
    await slot.on_partitions_assigned([PARTITION])
    await slot.on_partitions_revoked([PARTITION])
    handler = asyncio.create_task(slot.on_message(record(5), group))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert (slot.busy, slot.idle.is_set(), supervisor.said) == (PARTITION, False, [])
    await slot.on_partitions_assigned([PARTITION])
    await supervisor.begun.wait()
    await slot.stop(0.01)
    await handler
    assert (slot.busy, slot.idle.is_set(), supervisor.said) == (None, True, ["begins 5", "gives back 5"])


async def test_a_message_whose_partition_a_rebalance_gave_away_is_left_to_its_new_owner() -> None:
    supervisor = Supervisor()
    slot = slot_of(supervisor)
    await slot.on_partitions_revoked([PARTITION])
    handler = asyncio.create_task(slot.on_message(record(5, partition=1), Group()))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    await slot.on_partitions_assigned([PARTITION])
    await handler
    assert supervisor.said == []


async def test_a_slot_that_is_stopped_during_a_rebalance_does_not_wait_for_its_end() -> None:
    supervisor = Supervisor()
    slot = slot_of(supervisor)
    await slot.on_partitions_revoked([PARTITION])
    handler = asyncio.create_task(slot.on_message(record(5), Group()))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    await slot.stop(0.01)
    await handler
    assert supervisor.said == []
