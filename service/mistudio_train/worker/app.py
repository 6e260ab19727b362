"""The composition root: settings in, a FastStream application out. Nothing else creates a client or a slot."""

import asyncio
import ctypes
import gc
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import uvicorn
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.partitioner import DefaultPartitioner
from faststream import AckPolicy
from faststream.asgi import AsgiFastStream
from faststream.kafka import KafkaBroker, KafkaMessage
from faststream.kafka.message import FAKE_CONSUMER
from faststream.specification import AsyncAPI

from mistudio_schemas import TrainCancelled, TrainCompleted, TrainFailed, TrainProgress, record_for
from mistudio_train import SERVICE, __version__
from mistudio_train.errors import StoreUnavailable
from mistudio_train.gpu import list_gpus
from mistudio_train.settings import Settings

from . import http, kafka
from .assignor import BusyAwareAssignor
from .backoff import backoff
from .child_main import Job, train
from .devices import Devices
from .metrics import Metrics
from .nudge import Nudge
from .records import read_any_header_name
from .runner import Runner
from .sinks.feeds import Sinks
from .slots import Slot
from .store import Store, open_store
from .supervisor import Supervisor
from .workspace import remove_abandoned

logger = logging.getLogger(__name__)

HEARTBEAT_MS = 1000
"""A member learns of a rebalance from its next heartbeat, so whoever joins waits this long."""
bus_logger = logging.getLogger("mistudio_train.bus")
bus_logger.setLevel(logging.ERROR)
"""FastStream's. Its "received" and "processed" the supervisor says better, and it warns of what is meant to be so."""

M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 128 * 1024
"""Of `mallopt`: blocks of at least so many bytes go back to the system when they are freed."""
COLLECT_SECONDS = 1.0
THREADS_A_SLOT, MORE_THREADS = 8, 16
"""Of blocking calls; those to a store that hangs keep theirs for minutes, and must leave some to the others."""
LAST_CALLS_SECONDS = 1.0

FETCH_BYTES = 256 * 1024
"""That a slot has at hand; a larger message comes alone."""
NO_POLL_LIMIT_MS = 2**31 - 1
"""A job may take days; that it moves is watched by its silence, not by the poll interval."""


def build_app(
    settings: Settings, job: Job = train, assignor: Callable[[Slot], Any] = BusyAwareAssignor
) -> AsgiFastStream:
    """The worker's application. Nothing is connected before it starts.

    Args:
        job: what its children do.
        assignor: makes a slot's; with one of aiokafka's, nobody nudges.

    """
    read_any_header_name()
    store, metrics, ready = open_store(settings), Metrics(), asyncio.Event()
    broker = _broker(settings)
    devices = Devices(list_gpus, settings.max_concurrent_jobs, settings.cuda_memory_fraction)

    async def publish_progress(event: TrainProgress) -> None:
        record = record_for(event, source=settings.event_source, topics=settings.topics)
        headers = {name: value.decode() for name, value in record.headers}
        await broker.publish(record.value, record.topic, key=record.key, headers=headers)

    def speaks_for(job_id: str, partitions: list[int]) -> bool:
        """Of all workers one speaks for a job that none has begun: the one with the partition of its key."""
        number = DefaultPartitioner()(job_id.encode(), partitions, partitions)
        where = TopicPartition(settings.topics.requested, number)
        return any(where in (slot.assigned or ()) for slot in slots)

    sinks = Sinks(settings)
    runner = Runner(settings, store, devices, sinks, metrics, publish_progress, speaks_for, job)
    supervisor = Supervisor(settings, store, metrics, runner)
    slots = [Slot(number, settings, supervisor, metrics, ready) for number in range(settings.max_concurrent_jobs)]
    nudges = [_subscribe(broker, slot, settings, metrics, assignor(slot)) for slot in slots]
    _describe_outputs(broker, settings)
    background: list[asyncio.Task[None]] = []

    async def prepare() -> None:
        threads = THREADS_A_SLOT * settings.max_concurrent_jobs + MORE_THREADS
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads, "blocking"))
        await prepare_outside(settings, store)
        await asyncio.to_thread(remove_abandoned, settings.workspaces)

    async def begin() -> None:
        background.append(asyncio.create_task(runner.controls.follow()))
        await runner.controls.caught_up()
        ready.set()
        background.extend(asyncio.create_task(nudge.watch()) for nudge in nudges if nudge)
        logger.info("ready: %s reads %s", settings.worker_id, settings.topics.requested)

    async def stop_jobs() -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + settings.grace_seconds
        await asyncio.gather(*(slot.stop(settings.grace_seconds) for slot in slots))
        await sinks.close(until - loop.time())
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)

    return AsgiFastStream(
        broker,
        logger=None,
        asgi_routes=http.routes(store, slots, metrics, list_gpus),
        asyncapi_path="/asyncapi",
        specification=AsyncAPI(title=SERVICE, version=__version__),
        on_startup=[prepare],
        after_startup=[begin],
        on_shutdown=[stop_jobs],
    )


async def prepare_outside(settings: Settings, store: Store) -> None:
    """Topics and bucket, created where they are missing; waits for a broker or a store that is not up yet."""
    for delay in backoff():
        try:
            await kafka.ensure_topics(settings)
            return await asyncio.to_thread(store.ensure)
        except (KafkaError, StoreUnavailable, OSError) as error:
            why = (
                f"{error}. {error.hint}" if isinstance(error, StoreUnavailable) else f"{type(error).__name__}: {error}"
            )
            logger.warning("waiting for Kafka and the store, again in %.0f s: %s", delay, why)
            await asyncio.sleep(delay)
    raise AssertionError("backoff has no end")


async def serve(settings: Settings, job: Job = train, assignor: Callable[[Slot], Any] = BusyAwareAssignor) -> None:
    """Run the worker of `build_app` until it is told to stop."""
    config = uvicorn.Config(
        build_app(settings, job, assignor),
        host=settings.api_host,
        port=settings.api_port,
        log_config=None,
        log_level=logging.WARNING,
    )
    giving_back = asyncio.create_task(_give_memory_back())
    await Server(config).serve()
    giving_back.cancel()
    # a call to a store that hangs cannot be called off, and Python would wait for its thread for minutes
    end = threading.Timer(LAST_CALLS_SECONDS, os._exit, (0,))
    end.daemon = True
    end.start()


async def _give_memory_back() -> None:
    """Let what hostile messages of megabytes took go back to the system; a worker had kept a gigabyte of it."""
    # The GNU library learns from freed blocks of megabytes to keep such, in pieces; told a limit, it does not.
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    gc.collect()
    gc.freeze()  # the program's own objects, so that later collections have little to go through
    # What aiokafka has fetched and nobody read lies in cycles of a few objects, and Python counts objects, not bytes.
    while True:
        await asyncio.sleep(COLLECT_SECONDS)
        gc.collect()


class Server(uvicorn.Server):
    """Ends the worker in good order at the first signal; at once at the second one, and while nothing has begun."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a SIGTERM or a SIGINT."""
        if self.should_exit:
            logger.warning("told to stop again: this worker ends at once; what its jobs have not saved is lost")
            os._exit(128 + sig)
        if not self.started:
            os._exit(0)
        super().handle_exit(sig, frame)  # before a word is said: the next signal may come on hearing it
        logger.info("told to stop: jobs have some time to save what they have; a second signal ends all at once")


def _broker(settings: Settings) -> KafkaBroker:
    return KafkaBroker(
        settings.kafka_bootstrap_servers.split(","),
        security=kafka.faststream_security(settings),
        acks="all",
        max_request_size=kafka.MAX_MESSAGE_BYTES,
        allow_auto_create_topics=False,
        client_id=settings.worker_id,
        logger=bus_logger,
        log_level=logging.DEBUG,
    )


def _subscribe(broker: KafkaBroker, slot: Slot, settings: Settings, metrics: Metrics, assignor: Any) -> Nudge | None:
    """Give the slot a group member of its own. Bytes reach it as they are: what they mean, `intake` decides."""
    subscriber = broker.subscriber(
        settings.topics.requested,
        group_id=settings.kafka_group_id,
        auto_offset_reset="earliest",
        ack_policy=AckPolicy.MANUAL,
        no_reply=True,
        max_poll_interval_ms=NO_POLL_LIMIT_MS,
        rebalance_timeout_ms=60_000,
        session_timeout_ms=settings.kafka_session_timeout_ms,
        heartbeat_interval_ms=min(HEARTBEAT_MS, settings.kafka_session_timeout_ms // 3),
        fetch_max_bytes=FETCH_BYTES,
        max_partition_fetch_bytes=FETCH_BYTES,
        partition_assignment_strategy=[assignor],
        listener=slot,
        parser=_raw_message,
        decoder=_raw_value,
        title=f"train.requested, slot {slot.number}",
        description="A TrainRequested event (schemas/json/train.requested.v1.json).",
    )

    @subscriber
    async def on_message(body: Any, message: KafkaMessage) -> None:
        consumer: Any = subscriber.consumer
        await slot.on_message(message.raw_message, consumer)

    if not isinstance(assignor, BusyAwareAssignor):
        return None
    return Nudge(slot, assignor, lambda: subscriber.consumer, metrics)


async def _raw_message(record: Any, original: Any = None) -> KafkaMessage:
    """The record without any decoding, which hostile bytes could fail before we can dead-letter them."""
    return KafkaMessage(
        body=record.value or b"",
        headers={},
        raw_message=record,
        message_id=f"{record.topic}-{record.partition}-{record.offset}",
        consumer=FAKE_CONSUMER,  # the slot uses its subscriber's
    )


async def _raw_value(message: Any, original: Any = None) -> bytes:
    return bytes(message.body)


def _describe_outputs(broker: KafkaBroker, settings: Settings) -> None:
    """For the AsyncAPI page."""
    topics = settings.topics
    outputs: Sequence[tuple[str, type]] = (
        (topics.progress, TrainProgress),
        (topics.completed, TrainCompleted),
        (topics.failed, TrainFailed),
        (topics.cancelled, TrainCancelled),
    )
    for topic, schema in outputs:
        broker.publisher(topic, schema=schema, title=topic)
