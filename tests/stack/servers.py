"""What the tests of a stack do with its Kafka and its store, by the clients that the worker uses."""

import io
from collections.abc import Iterable
from http import HTTPMethod, HTTPStatus

import psutil
import urllib3
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from minio import Minio

from mistudio_stack import Stack


async def create_topic(stack: Stack, topic: str) -> None:
    """One partition."""
    admin = AIOKafkaAdminClient(bootstrap_servers=stack.bootstrap_servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, num_partitions=1, replication_factor=1)])
    finally:
        await admin.close()


async def topics(stack: Stack) -> set[str]:
    """The names of all topics."""
    admin = AIOKafkaAdminClient(bootstrap_servers=stack.bootstrap_servers)
    await admin.start()
    try:
        return set(await admin.list_topics())
    finally:
        await admin.close()


async def write(stack: Stack, topic: str, value: bytes, *, commit: bool = True) -> None:
    """One record in a transaction of its own."""
    producer = AIOKafkaProducer(bootstrap_servers=stack.bootstrap_servers, transactional_id=topic)
    async with producer:
        await producer.begin_transaction()
        await producer.send_and_wait(topic, value)
        await (producer.commit_transaction() if commit else producer.abort_transaction())


async def read_committed(stack: Stack, topic: str, count: int) -> list[bytes | None]:
    """The first committed records."""
    consumer = AIOKafkaConsumer(bootstrap_servers=stack.bootstrap_servers, isolation_level="read_committed")
    async with consumer:
        partition = TopicPartition(topic, 0)
        consumer.assign([partition])
        consumer.seek(partition, 0)
        return [(await consumer.getone()).value for _ in range(count)]


def store(stack: Stack) -> Minio:
    """A client of the stack's store."""
    return Minio(stack.minio_endpoint, access_key=stack.access_key, secret_key=stack.secret_key, secure=stack.secure)


def put(stack: Stack, bucket: str, key: str, value: bytes) -> None:
    """Write an object, in a bucket that is made when it is missing."""
    client = store(stack)
    if not client.bucket_exists(bucket):
        client.make_bucket(bucket)
    client.put_object(bucket, key, io.BytesIO(value), len(value))


def put_if_absent(stack: Stack, bucket: str, key: str, value: bytes) -> HTTPStatus:
    """Write an object unless the key is taken."""
    url = store(stack).get_presigned_url(HTTPMethod.PUT, bucket, key)
    with urllib3.PoolManager() as http:
        return HTTPStatus(http.request("PUT", url, body=value, headers={"If-None-Match": "*"}).status)


def get(stack: Stack, bucket: str, key: str) -> bytes:
    """Read an object."""
    with store(stack).get_object(bucket, key) as response:
        return response.read()


def wait_until_gone(pids: Iterable[int], seconds: float = 20.0) -> list[int]:
    """Wait for processes to end; gives those that did not. One that only awaits its parent's notice has ended."""
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _gone, alive = psutil.wait_procs(processes, timeout=seconds)
    return [process.pid for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
