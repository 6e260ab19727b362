"""For tests and benchmarks: servers that go away at a chosen moment of a job, and what must be true afterwards."""

import asyncio
import contextlib
import hashlib
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from mistudio_schemas import TrainCompleted, TrainRequested, record_for
from mistudio_train.messages import Finished, JobSpec, Parent
from mistudio_train.settings import Settings
from mistudio_train.worker.corpora import put_corpus
from mistudio_train.worker.delivery import Delivery
from mistudio_train.worker.s3_store import S3Store
from mistudio_train.worker.store import open_store

from . import jobs
from .bus import events, publish, reading, running_worker

Moment = Literal["corpus", "checkpoint", "upload", "swap", "beginning", "terminal", "transaction"]
STORE_MOMENTS: tuple[Moment, ...] = ("corpus", "checkpoint", "upload", "swap")
BROKER_MOMENTS: tuple[Moment, ...] = ("beginning", "terminal", "transaction")
ARTIFACT_BYTES = 20 * 1024 * 1024
"""Of the large one: two parts of a multipart upload."""


def counts_and_writes_much(spec: JobSpec, parent: Parent) -> Finished:
    """Checkpoints as `counts` makes them, and a large artifact."""
    finished = jobs.counts(spec, parent)
    (spec.output / "z_large.bin").write_bytes(os.urandom(1024) * (ARTIFACT_BYTES // 1024))
    return finished


@dataclass(frozen=True)
class Waited:
    """A job that met an outage."""

    done: TrainCompleted
    seconds: float
    """From the outage's beginning to the terminal event."""


class Trigger:
    """Does something the first time that it is pulled, from whatever thread."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action, self._lock = action, threading.Lock()
        self.at: float | None = None

    def pull(self) -> None:
        with self._lock:
            if self.at is None:
                self.at = time.monotonic()
                self._action()


@contextmanager
def at(moment: Moment, action: Callable[[], None]) -> Iterator[Trigger]:
    """Have `action` done when a worker of this process comes to the moment for the first time."""
    trigger = Trigger(action)

    def before(owner: Any, name: str, fits: Callable[..., bool]) -> Any:
        original = getattr(owner, name)
        if asyncio.iscoroutinefunction(original):

            async def awaited(self: Any, *args: Any, **more: Any) -> Any:
                if fits(*args):
                    await asyncio.to_thread(trigger.pull)
                return await original(self, *args, **more)

            return mock.patch.object(owner, name, awaited)

        def called(self: Any, *args: Any, **more: Any) -> Any:
            if fits(*args):
                trigger.pull()
            return original(self, *args, **more)

        return mock.patch.object(owner, name, called)

    match moment:
        case "corpus":
            patched = before(S3Store, "get_file", lambda key, *_: "corpora/" in key)
        case "checkpoint":
            patched = before(S3Store, "put_file", lambda key, *_: "/checkpoints/" in key)
        case "upload":
            patched = before(S3Store, "put_file", lambda key, *_: key.endswith("/sae_model.pt"))
        case "swap":
            patched = before(S3Store, "_put_if", lambda _, data, *__: b'"finished"' in data)
        case "beginning":
            patched = before(Delivery, "__aenter__", lambda: True)
        case "terminal":
            patched = before(Delivery, "place", lambda *_: True)
        case "transaction":
            patched = before(AIOKafkaProducer, "send_offsets_to_transaction", lambda *_: True)
    with patched:
        yield trigger


def away(server: Any, how: Literal["killed", "paused"], seconds: float) -> Callable[[], None]:
    """An action: the server is away for so long."""

    def act() -> None:
        if how == "killed":
            server.kill()
        else:
            server.pause()
        threading.Timer(seconds, server.start if how == "killed" else server.resume).start()

    return act


def lay_corpus(settings: Settings, folder: Path) -> None:
    """A corpus in the store, `stored.txt`."""
    store = open_store(settings)
    store.ensure()
    (folder / "stored.txt").write_text("one\ntwo\nthree\n")
    put_corpus(store, "stored.txt", folder / "stored.txt")


async def job_through(moment: Moment, action: Callable[[], None], settings: Settings, patience: float) -> Waited:
    """Run one job whose worker meets an outage, and see that it ends as if there had been none."""
    asked = TrainRequested(model_name="m", corpus_file="stored.txt", job_id="job-1")
    topics = settings.topics
    ends = topics.completed, topics.failed, topics.cancelled
    await publish(settings, record_for(asked, source="/test", topics=topics).as_dict() | {"partition": 0})
    with at(moment, action) as trigger:
        async with running_worker(settings, counts_and_writes_much):
            async with asyncio.timeout(60):
                while trigger.at is None:  # noqa: ASYNC110 - a thread's
                    await asyncio.sleep(0.05)
            async with _patient_reader(settings, ends, patience) as reader:
                await reader.until(bool, patience)
                seconds = time.monotonic() - trigger.at
                await asyncio.sleep(1)
                found = events(await reader.drained())
    assert len(found) == 1, f"{len(found)} terminal events"
    (done,) = found
    assert isinstance(done, TrainCompleted), done
    await asyncio.to_thread(check_artifacts, done, settings)
    return Waited(done, seconds)


@asynccontextmanager
async def _patient_reader(settings: Settings, topics: tuple[str, ...], patience: float) -> AsyncIterator[Any]:
    """A reader that begins when there is a broker again."""
    deadline = time.monotonic() + patience
    while True:
        try:
            async with contextlib.AsyncExitStack() as stack:
                reader = await stack.enter_async_context(reading(settings, *topics))
                stack = stack.pop_all()
            break
        except (KafkaError, OSError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.5)
    async with stack:
        yield reader


def check_artifacts(done: TrainCompleted, settings: Settings) -> None:
    """Every object that the event names is there, and is what it says."""
    store = open_store(settings)
    assert len(done.artifacts) == 4
    for one in [*done.artifacts, done.manifest]:
        data, _ = store.get_bytes(one.key)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (one.size, one.sha256), one.key


def refusal(status: str, code: str) -> str:
    """As an S3 store says no."""
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>"
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close"
    return f"{head}\r\n\r\n{body}"


class Proxy:
    """Stands before a store, and breaks connections: `cut_after` ends one in its midst, `answer` answers."""

    def __init__(self, target: str) -> None:
        self._host, port = target.split(":")
        self._port = int(port)
        self.cut_after: int | None = None
        """Bytes of the next connections that get through to the server, while it is set."""
        self.answer: str | None = None
        """Of HTTP, in place of the store's."""
        self.cuts = self.refusals = 0
        self.address = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Proxy"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            to_reader, to_writer = await asyncio.open_connection(self._host, self._port)
            back = asyncio.create_task(self._copy(to_reader, writer))
            try:
                await self._forth(reader, to_writer, writer)
            finally:
                back.cancel()
                to_writer.close()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _forth(
        self, reader: asyncio.StreamReader, to_writer: asyncio.StreamWriter, writer: asyncio.StreamWriter
    ) -> None:
        passed = 0
        while data := await reader.read(65536):
            if self.answer is not None:
                self.refusals += 1
                writer.write(self.answer.encode())
                await writer.drain()
                return
            passed += len(data)
            if self.cut_after is not None and passed > self.cut_after:
                self.cuts += 1
                writer.transport.abort()
                return
            to_writer.write(data)
            await to_writer.drain()

    @staticmethod
    async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
