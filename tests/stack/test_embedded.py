"""The embedded broker does what a single worker needs of Kafka. aiokafka is the worker's own client."""

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.structs import OffsetAndMetadata

from mistudio_stack.embedded import embedded_kafka


async def test_a_message_keeps_key_value_and_headers() -> None:
    with embedded_kafka({"jobs": 4}) as servers:
        async with AIOKafkaProducer(bootstrap_servers=servers) as producer:
            sent = await producer.send_and_wait("jobs", b"\xff", key=b"job", headers=[("ce_id", b"\x00\x01")])
        async with AIOKafkaConsumer("jobs", bootstrap_servers=servers, auto_offset_reset="earliest") as consumer:
            got = await consumer.getone()
    assert (got.partition, got.offset) == (sent.partition, sent.offset)
    assert (got.key, got.value, got.headers) == (b"job", b"\xff", (("ce_id", b"\x00\x01"),))


async def test_topics_have_the_partitions_asked_for() -> None:
    with embedded_kafka({"many": 64, "one": 1}) as servers:
        async with AIOKafkaProducer(bootstrap_servers=servers) as producer:
            assert len(await producer.partitions_for("many")) == 64
            assert len(await producer.partitions_for("one")) == 1


async def test_a_group_goes_on_behind_its_committed_offset() -> None:
    partition = TopicPartition("jobs", 0)
    with embedded_kafka({"jobs": 1}) as servers:
        async with AIOKafkaProducer(bootstrap_servers=servers) as producer:
            for value in (b"a", b"b", b"c"):
                await producer.send_and_wait("jobs", value)
        async with _member(servers) as first:
            assert [(await first.getone()).value for _ in range(2)] == [b"a", b"b"]
            await first.commit({partition: OffsetAndMetadata(1, "")})
        async with _member(servers) as second:
            assert await second.committed(partition) == 1
            assert [(await second.getone()).value for _ in range(2)] == [b"b", b"c"]
            second.seek(partition, 0)
            assert (await second.getone()).value == b"a"


async def test_two_brokers_share_nothing() -> None:
    with embedded_kafka({"jobs": 1}) as one, embedded_kafka({"jobs": 1}) as other:
        assert one != other
        async with AIOKafkaProducer(bootstrap_servers=one) as producer:
            await producer.send_and_wait("jobs", b"a")
        async with AIOKafkaConsumer(bootstrap_servers=other) as consumer:
            partition = TopicPartition("jobs", 0)
            assert await consumer.end_offsets([partition]) == {partition: 0}


def _member(servers: str) -> AIOKafkaConsumer:
    return AIOKafkaConsumer(
        "jobs",
        bootstrap_servers=servers,
        group_id="workers",
        session_timeout_ms=2000,
        heartbeat_interval_ms=500,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
