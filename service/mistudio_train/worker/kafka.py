"""How to reach the broker, and the topics as the design wants them. Knows no job.

FastStream is the bus; the raw clients here are for what it has not: transactions, offsets, binary headers, admin.
"""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, KafkaTimeoutError, for_code

from mistudio_train.settings import Settings

if TYPE_CHECKING:
    from faststream.security import BaseSecurity

logger = logging.getLogger(__name__)

DAY_MS = 24 * 3600 * 1000
MAX_MESSAGE_BYTES = 10 * 1024 * 1024
MAX_LETTER_BYTES = MAX_MESSAGE_BYTES + 64 * 1024
"""Of a dead letter: any message, and the reason."""
START_SECONDS, CLOSE_SECONDS, CANCEL_SECONDS = 60.0, 5.0, 1.0

Client = TypeVar("Client", AIOKafkaConsumer, AIOKafkaProducer)


def ssl_context(settings: Settings) -> ssl.SSLContext | None:
    """The TLS settings; `None` when the listener is plain text."""
    if "SSL" not in settings.kafka_security_protocol:
        return None
    context = ssl.create_default_context(cafile=settings.kafka_ssl_cafile)
    if settings.kafka_ssl_certfile:
        context.load_cert_chain(settings.kafka_ssl_certfile, settings.kafka_ssl_keyfile)
    return context


def client_options(settings: Settings) -> dict[str, Any]:
    """Keyword arguments of every aiokafka client."""
    options: dict[str, Any] = {
        "bootstrap_servers": settings.kafka_bootstrap_servers,
        "security_protocol": settings.kafka_security_protocol,
        "ssl_context": ssl_context(settings),
    }
    if settings.kafka_security_protocol.startswith("SASL"):
        options |= {
            "sasl_mechanism": settings.kafka_sasl_mechanism,
            "sasl_plain_username": settings.kafka_sasl_username,
            "sasl_plain_password": _sasl_password(settings),
        }
    return options


def faststream_security(settings: Settings) -> "BaseSecurity | None":
    """The same for FastStream's broker."""
    # clients that only submit or watch need not wait for FastStream
    from faststream.security import BaseSecurity, SASLPlaintext, SASLScram256, SASLScram512

    context = ssl_context(settings)
    if settings.kafka_security_protocol == "PLAINTEXT":
        return None
    if settings.kafka_security_protocol == "SSL":
        return BaseSecurity(ssl_context=context, use_ssl=True)
    kinds = {"PLAIN": SASLPlaintext, "SCRAM-SHA-256": SASLScram256, "SCRAM-SHA-512": SASLScram512}
    return kinds[settings.kafka_sasl_mechanism](
        username=settings.kafka_sasl_username or "",
        password=_sasl_password(settings),
        ssl_context=context,
        use_ssl=context is not None,
    )


def _sasl_password(settings: Settings) -> str:
    return settings.kafka_sasl_password.get_secret_value() if settings.kafka_sasl_password else ""


def producer(settings: Settings, transactional_id: str | None = None) -> AIOKafkaProducer:
    """An idempotent producer; with a transactional id, starting it fences every earlier one of that id."""
    return AIOKafkaProducer(
        **client_options(settings),
        transactional_id=transactional_id,
        enable_idempotence=settings.kafka_transactions,
        acks="all",
        max_request_size=MAX_LETTER_BYTES,
    )


Isolation = Literal["read_committed", "read_uncommitted"]


def reader(settings: Settings, isolation: Isolation = "read_committed") -> AIOKafkaConsumer:
    """A consumer outside every group."""
    return AIOKafkaConsumer(
        **client_options(settings),
        group_id=None,
        auto_offset_reset="earliest",  # of a place that retention has removed, what follows it
        enable_auto_commit=False,
        isolation_level=isolation,
        max_partition_fetch_bytes=MAX_MESSAGE_BYTES,
    )


@asynccontextmanager
async def started(client: Client) -> AsyncIterator[Client]:
    """The client, started; on the way out it is closed. Raises as `start` does."""
    await start(client)
    try:
        yield client
    finally:
        await close(client)


async def start(client: AIOKafkaConsumer | AIOKafkaProducer) -> None:
    """Start a client; one that cannot be started is closed to its end.

    Raises:
        KafkaTimeoutError: if it does not come to an end: a client whose broker dies meanwhile may wait for ever.
        KafkaError: if the broker refuses, or is not there.

    """
    try:
        await _at_most(START_SECONDS, client.start())
    except TimeoutError:
        await close(client)
        raise KafkaTimeoutError(f"a client of the broker has not started within {START_SECONDS:.0f} s") from None
    except BaseException:
        await close(client)
        raise


async def close(client: AIOKafkaConsumer | AIOKafkaProducer) -> None:
    """Close a client to its end, also when the caller is cancelled meanwhile: half closed it keeps its connections.

    A broker that is away does not hold this up, nor does a client that minds no cancellation; neither is an error.
    """
    closing = asyncio.create_task(_close(client))
    try:
        await asyncio.shield(closing)
    except asyncio.CancelledError:
        await asyncio.wait([closing])
        raise


async def _close(client: AIOKafkaConsumer | AIOKafkaProducer) -> None:
    try:
        await _at_most(CLOSE_SECONDS, client.stop())
    except (KafkaError, TimeoutError, AssertionError) as error:
        # aiokafka raises AssertionError from a producer that an earlier error has killed
        logger.debug("closing a client: %s", type(error).__name__)
    except asyncio.CancelledError:
        # a consumer that lost its broker while it started ends with its own inner task's cancellation, which nobody
        # meant for us: passed on, it would silently end whoever closes it
        if asyncio.current_task().cancelling():  # type: ignore[union-attr]
            raise


async def _at_most(seconds: float, doing: Coroutine[Any, Any, None]) -> None:
    """Do it; if it takes longer, or the caller is cancelled, it is cancelled and given a moment to end.

    A client may swallow a cancellation, for which `asyncio.timeout` and `wait_for` would wait for ever.

    Raises:
        TimeoutError: if it took longer.

    """
    task = asyncio.ensure_future(doing)
    try:
        ended, _ = await asyncio.wait([task], timeout=seconds)
    finally:
        if task.cancel():
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # whatever it is, nobody asks
            await asyncio.wait([task], timeout=CANCEL_SECONDS)
    if not ended:
        raise TimeoutError
    await task


@dataclass(frozen=True)
class TopicPlan:
    """How a topic should be."""

    name: str
    partitions: int
    config: dict[str, str]


def topic_plans(settings: Settings) -> list[TopicPlan]:
    """The topics with the partitions, retention and clean-up of the design."""
    names = settings.topics
    year = {"cleanup.policy": "delete", "retention.ms": str(365 * DAY_MS), "max.message.bytes": str(MAX_MESSAGE_BYTES)}
    month = year | {"retention.ms": str(30 * DAY_MS)}
    return [
        TopicPlan(names.requested, settings.kafka_request_partitions, year),
        TopicPlan(names.control, 1, year),
        TopicPlan(names.progress, 8, month | {"cleanup.policy": "compact,delete"}),
        TopicPlan(names.completed, 8, year),
        TopicPlan(names.failed, 8, year),
        TopicPlan(names.cancelled, 8, year),
        # kept as long as its message: a group whose offsets are forgotten finds there that it has ended
        TopicPlan(names.dead_letter, 1, year | {"max.message.bytes": str(MAX_LETTER_BYTES)}),
    ]


async def ensure_topics(settings: Settings) -> list[str]:
    """Create the topics that are missing; say where one that exists differs. Returns the names created.

    Raises:
        KafkaError: if the broker does not answer or does not allow it.

    """
    admin = AIOKafkaAdminClient(**client_options(settings))
    await admin.start()
    try:
        existing = set(await admin.list_topics())
        plans = topic_plans(settings)
        missing = [plan for plan in plans if plan.name not in existing]
        if missing:
            await _create(admin, missing, settings)
        await _report_differences(admin, [plan for plan in plans if plan.name in existing])
        return [plan.name for plan in missing]
    finally:
        await admin.close()


async def _create(admin: AIOKafkaAdminClient, plans: list[TopicPlan], settings: Settings) -> None:
    brokers = len((await admin.describe_cluster())["brokers"])
    copies = settings.kafka_replication_factor or min(3, brokers)
    response = await admin.create_topics(
        [NewTopic(plan.name, plan.partitions, copies, topic_configs=plan.config) for plan in plans]
    )
    for name, code, *_ in response.topic_errors:
        error = for_code(code)
        if error.errno == 36:  # another worker was first
            continue
        if code:
            raise error(f"cannot create the topic {name}")
        logger.info("created topic %s", name)


async def _report_differences(admin: AIOKafkaAdminClient, plans: list[TopicPlan]) -> None:
    if not plans:
        return
    try:
        described = {topic["topic"]: topic for topic in await admin.describe_topics([plan.name for plan in plans])}
        resources = [ConfigResource(ConfigResourceType.TOPIC, plan.name) for plan in plans]
        responses = await admin.describe_configs(resources)
    except (KafkaError, NotImplementedError) as error:
        logger.info("this broker does not describe its topics (%s); they are used as they are", type(error).__name__)
        return
    actual = {
        resource[3]: {entry[0]: entry[1] for entry in resource[4]}
        for response in responses
        for resource in response.resources
    }
    for plan in plans:
        for difference in _differences(plan, len(described[plan.name]["partitions"]), actual.get(plan.name, {})):
            logger.warning("topic %s differs: %s", plan.name, difference)


def _differences(plan: TopicPlan, partitions: int, actual: dict[str, str]) -> list[str]:
    found = [] if partitions >= plan.partitions else [f"it has {partitions} partitions, {plan.partitions} are wanted"]
    for key, wanted in plan.config.items():
        have = actual.get(key)
        if have is not None and set(have.split(",")) != set(wanted.split(",")):
            found.append(f"{key} is {have}, {wanted} is wanted")
    return found
