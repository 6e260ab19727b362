"""The tests' own eyes and voice on the topics, through another client library than the worker's."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Producer, TopicPartition

from mistudio_schemas import KafkaRecord, TrainCancelled, TrainCompleted, TrainFailed, TrainProgress, record_for
from mistudio_train.settings import Settings
from mistudio_train.worker import kafka

WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class Seen:
    """A record of a topic."""

    key: bytes
    value: bytes
    headers: dict[str, str]
    milliseconds: int


def create_topics(settings: Settings) -> None:
    asyncio.run(kafka.ensure_topics(settings))


def read_all(settings: Settings, topic: str) -> list[Seen]:
    """What lies on the topic now."""
    consumer = Consumer(
        {"bootstrap.servers": settings.kafka_bootstrap_servers, "group.id": "tests", "enable.partition.eof": True}
    )
    try:
        numbers = consumer.list_topics(topic, timeout=WAIT_SECONDS).topics[topic].partitions
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in numbers])
        found: list[Seen] = []
        ends = 0
        while ends < len(numbers):
            record = consumer.poll(WAIT_SECONDS)
            assert record is not None
            if (error := record.error()) is None:
                found.append(_seen(record))
            else:
                assert error.code() == KafkaError._PARTITION_EOF
                ends += 1
        return found
    finally:
        consumer.close()


def _seen(record: Any) -> Seen:
    headers = {name: value.decode(errors="replace") for name, value in record.headers() or ()}
    return Seen(record.key(), record.value(), headers, record.timestamp()[1])


def publish(settings: Settings, *events: TrainProgress | TrainCompleted | TrainFailed | TrainCancelled) -> None:
    send(settings, [record_for(event, source="/tests", topics=settings.topics) for event in events])


def send(settings: Settings, records: Iterable[KafkaRecord], partition: int = -1) -> None:
    """Returns when all are acknowledged. Without a partition the keys choose."""
    producer = Producer({"bootstrap.servers": settings.kafka_bootstrap_servers, "partitioner": "murmur2_random"})
    for record in records:
        producer.produce(
            record.topic, key=record.key, value=record.value, headers=list(record.headers), partition=partition
        )
    assert producer.flush(WAIT_SECONDS) == 0
