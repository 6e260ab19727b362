"""A request goes where the group has least to do, and to its key's partition where that cannot be known."""

import asyncio

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import GroupAuthorizationFailedError
from aiokafka.structs import OffsetAndMetadata
from confluent_kafka import Consumer
from confluent_kafka import TopicPartition as Place

from mistudio_schemas import KafkaRecord
from mistudio_train.cli import group
from mistudio_train.settings import Settings
from mistudio_train.worker import kafka
from mistudio_train.worker.deliveries import transactional_id
from tests.cli.conftest import Cli
from tests.cli.topics import send

MINIMAL = ("submit", "--model-name", "gpt2", "--corpus-file", "stories.txt", "--job-id", "j")


def fill(settings: Settings, *counts: int) -> None:
    """So many messages in each partition."""
    topic = settings.topics.requested
    for partition, count in enumerate(counts):
        send(settings, [KafkaRecord(topic, b"k", b"{}", [])] * count, partition=partition)


def pass_by(settings: Settings, offsets: dict[int, int]) -> None:
    """What the group's worker does at the end of a job: its transactional producer commits."""

    async def commit() -> None:
        for partition, offset in offsets.items():
            place = TopicPartition(settings.topics.requested, partition)
            async with kafka.started(kafka.producer(settings, transactional_id(settings, place))) as producer:
                await producer.begin_transaction()
                await producer.send_offsets_to_transaction(
                    {place: OffsetAndMetadata(offset, "")}, settings.kafka_group_id
                )
                await producer.commit_transaction()
        async with asyncio.timeout(30):  # an acknowledged offset is readable once the broker has written its marker
            while await group.committed(settings, offsets) != offsets:  # noqa: ASYNC110 - only the broker knows
                await asyncio.sleep(0.05)

    asyncio.run(commit())


def ends(settings: Settings) -> list[int]:
    consumer = Consumer({"bootstrap.servers": settings.kafka_bootstrap_servers, "group.id": "tests"})
    try:
        return [
            consumer.get_watermark_offsets(Place(settings.topics.requested, partition), timeout=30)[1]
            for partition in range(settings.kafka_request_partitions)
        ]
    finally:
        consumer.close()


def test_a_request_goes_to_the_partition_with_least_before_it(cli: Cli, settings: Settings) -> None:
    fill(settings, 1, 2, 3, 4)
    pass_by(settings, {2: 3, 3: 2})
    assert asyncio.run(group.waiting(settings, range(4))) == {0: 1, 1: 2, 2: 0, 3: 2}
    assert cli(*MINIMAL).status == 0
    assert ends(settings) == [1, 2, 4, 4]


def test_a_partition_without_a_committed_offset_waits_from_its_beginning(cli: Cli, settings: Settings) -> None:
    fill(settings, 1, 1, 0, 1)
    assert cli(*MINIMAL).status == 0
    assert ends(settings) == [1, 1, 1, 1]


def test_several_requests_spread(cli: Cli, settings: Settings) -> None:
    for _ in range(4):
        assert cli(*MINIMAL).status == 0
    assert ends(settings) == [1, 1, 1, 1]


def test_of_equals_any_is_chosen() -> None:
    chosen = {group.emptiest({0: 3, 1: 0, 2: 0}) for _ in range(100)}
    assert chosen == {1, 2}
    waiting = {0: 1, 1: 0}
    assert [group.emptiest(waiting), waiting] == [1, {0: 1, 1: 1}]


def test_a_client_that_may_not_ask_leaves_it_to_the_key(
    cli: Cli, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(*_: object) -> dict[int, int]:
        raise GroupAuthorizationFailedError(settings.kafka_group_id)

    monkeypatch.setattr(group, "committed", refused)
    for _ in range(3):
        assert cli(*MINIMAL).status == 0
    assert sorted(ends(settings)) == [0, 0, 0, 3]
