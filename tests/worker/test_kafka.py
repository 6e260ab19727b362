"""Topics as the design wants them, clients that close to their end, and a broker that wants TLS and a password."""

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaTimeoutError

from mistudio_schemas import TrainRequested, record_for
from mistudio_stack.native import kafka_server
from mistudio_stack.process import free_ports
from mistudio_train.settings import Settings
from mistudio_train.worker import kafka

from . import jobs
from .bus import publish, reading, running_worker

DAY_MS = 24 * 3600 * 1000
PASSWORD = "the-workers-password"


async def described(settings: Settings) -> dict[str, tuple[int, dict[str, str]]]:
    """Name to partitions and configuration of the topics of these settings."""
    admin = AIOKafkaAdminClient(**kafka.client_options(settings))
    await admin.start()
    try:
        names = list(settings.topics.all())
        found = {one["topic"]: len(one["partitions"]) for one in await admin.describe_topics(names)}
        answers = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name) for name in names])
        configs = {
            resource[3]: {entry[0]: entry[1] for entry in resource[4]}
            for answer in answers
            for resource in answer.resources
        }
        return {name: (found[name], configs[name]) for name in names}
    finally:
        await admin.close()


async def test_missing_topics_are_made_with_partitions_retention_and_compaction(worker_settings: Settings) -> None:
    settings = worker_settings.model_copy(update={"kafka_request_partitions": 64})
    topics = settings.topics
    assert sorted(await kafka.ensure_topics(settings)) == sorted(topics.all())
    assert await kafka.ensure_topics(settings) == []
    found = await described(settings)
    assert found[topics.requested][0] == 64
    assert set(found[topics.progress][1]["cleanup.policy"].split(",")) == {"compact", "delete"}
    for terminal in (topics.requested, topics.control, topics.completed, topics.failed, topics.cancelled):
        assert found[terminal][1]["cleanup.policy"] == "delete"
        assert int(found[terminal][1]["retention.ms"]) >= 365 * DAY_MS


async def test_a_topic_that_differs_is_named_and_left_as_it_is(
    worker_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    topic = worker_settings.topics.requested
    admin = AIOKafkaAdminClient(**kafka.client_options(worker_settings))
    await admin.start()
    await admin.create_topics([NewTopic(topic, 1, 1, topic_configs={"retention.ms": "1000"})])
    while topic not in await admin.list_topics():  # noqa: ASYNC110 - a broker tells of a new topic a moment later
        await asyncio.sleep(0.02)
    await admin.close()
    await kafka.ensure_topics(worker_settings)
    said = [record.getMessage() for record in caplog.records if topic in record.getMessage()]
    assert f"topic {topic} differs: it has 1 partitions, 4 are wanted" in said
    assert f"topic {topic} differs: retention.ms is 1000, {365 * DAY_MS} is wanted" in said
    assert (await described(worker_settings))[topic][0] == 1


async def test_a_client_that_ends_in_a_cancellation_of_its_own_does_not_end_its_user() -> None:
    class Client:
        async def stop(self) -> None:
            inner = asyncio.ensure_future(asyncio.sleep(1))
            inner.cancel()
            await inner

    client: Any = Client()
    await kafka.close(client)


async def test_a_client_that_minds_no_cancellation_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("START_SECONDS", "CLOSE_SECONDS", "CANCEL_SECONDS"):
        monkeypatch.setattr(kafka, name, 0.1)
    released, swallowed = asyncio.Event(), []

    class Client:
        async def start(self) -> None:
            while not released.is_set():
                try:
                    await released.wait()
                except asyncio.CancelledError as error:
                    swallowed.append(error)

        stop = start

    client: Any = Client()
    with pytest.raises(KafkaTimeoutError, match="has not started"):
        await kafka.start(client)
    await kafka.close(client)
    user = asyncio.create_task(kafka.start(client))
    await asyncio.sleep(0)
    user.cancel()
    with pytest.raises(asyncio.CancelledError):
        await user
    assert len(swallowed) == 5  # two starts, and a close after each and between them
    released.set()


async def test_a_client_is_closed_to_its_end_though_its_user_is_cancelled(worker_settings: Settings) -> None:
    closing, client = asyncio.Event(), kafka.producer(worker_settings)
    really_stop = client.stop

    async def stop() -> None:
        closing.set()
        await really_stop()

    client.stop = stop

    async def use() -> None:
        async with kafka.started(client):
            pass

    task = asyncio.create_task(use())
    await closing.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert all(not connection.connected() for connection in client.client._conns.values())


def certificate(folder: Path) -> Path:
    """A key and a certificate for 127.0.0.1 that vouches for itself, in one PEM file."""
    key, pem = folder / "key.pem", folder / "broker.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(folder / "ca.pem")]
    subprocess.run(command, check=True, capture_output=True)
    pem.write_text(key.read_text() + (folder / "ca.pem").read_text())
    return pem


@contextmanager
def secured_broker(folder: Path) -> Iterator[dict[str, Any]]:
    """A broker that speaks TLS and knows one user by password; yields the settings that reach it."""
    pem, (port, controller_port) = certificate(folder), free_ports(2)
    login = (
        "org.apache.kafka.common.security.plain.PlainLoginModule required "
        f'username="broker" password="b" user_broker="b" user_worker="{PASSWORD}";'
    )
    wanted = {
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(pem),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(folder / "ca.pem"),
        "sasl.enabled.mechanisms": "PLAIN",
        "sasl.mechanism.inter.broker.protocol": "PLAIN",
        "listener.name.clients.plain.sasl.jaas.config": login,
    }
    server = kafka_server(folder, port, controller_port, "SASL_SSL", wanted)
    server.start()
    try:
        yield {
            "kafka_bootstrap_servers": f"127.0.0.1:{port}",
            "kafka_security_protocol": "SASL_SSL",
            "kafka_sasl_username": "worker",
            "kafka_sasl_password": PASSWORD,
            "kafka_ssl_cafile": str(folder / "ca.pem"),
        }
    finally:
        server.kill()


async def test_a_job_ends_once_on_a_broker_that_wants_tls_and_a_password(
    worker_env: dict[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with secured_broker(tmp_path) as reach:
        settings = Settings.model_validate({name.lower(): value for name, value in worker_env.items()} | reach)
        samples = settings.data_path / "samples"
        samples.mkdir(parents=True)
        (samples / "corpus.txt").write_text("one\ntwo\n")
        asked = TrainRequested(model_name="m", corpus_file="corpus.txt", job_id="job-1")
        await publish(settings, record_for(asked, source="/test", topics=settings.topics).as_dict())
        async with running_worker(settings, jobs.works), reading(settings, settings.topics.completed) as reader:
            (done,) = await reader.of(settings.topics.completed, 1)
    assert done.key == b"job-1"
    printed = caplog.text + "".join(capfd.readouterr()) + repr(settings)
    assert PASSWORD not in printed


async def test_a_client_that_hears_nothing_gives_up(worker_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka, "START_SECONDS", 0.3)
    connected: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: connected.append(writer), "127.0.0.1", 0)
    where = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    settings = worker_settings.model_copy(update={"kafka_bootstrap_servers": where})
    for client in (kafka.reader(settings), kafka.producer(settings, "id")):
        with pytest.raises(KafkaTimeoutError, match="has not started"):
            await kafka.start(client)
    assert len(connected) == 2
    for writer in connected:
        writer.close()
    silent.close()
