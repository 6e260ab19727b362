"""Real servers, real workers, each a process that can be killed: started, found and ended here. Decides nothing."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from aiokafka.errors import KafkaError

from mistudio_schemas import TrainRequested, record_for
from mistudio_stack import NativeStack, Server, native_stack
from mistudio_train.settings import Settings
from mistudio_train.worker import kafka
from mistudio_train.worker.corpora import put_corpus
from mistudio_train.worker.store import Store, open_store
from tests.worker.bus import publish, reading

from . import nursery
from .mixture import CORPUS, Size, make_inputs, mixture
from .points import TRAP, Stage, Trap
from .watch import Watch, watching
from .worker import STAGE, Child, children_of

PARTITIONS = 12
GRACE_SECONDS = 8
ASK_SECONDS = 15.0
CHILD_GONE_SECONDS = 5.0
"""A child ends by itself so soon after its worker was killed."""


@dataclass(eq=False)
class Worker:
    """A worker's process: one life of a slot."""

    slot: int
    name: str
    process: "subprocess.Popen[bytes]"
    data_path: Path
    log: Path
    trap: Trap | None
    frozen: bool = False
    ended_by: str | None = None
    """What was done to it, if it was meant to end."""

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    @property
    def ready(self) -> bool:
        """Whether it takes messages."""
        return "ready: " in self.log.read_text(errors="replace")

    @property
    def children(self) -> list[Child]:
        """Those of its slot that live."""
        return children_of(self.data_path)

    @property
    def stage(self) -> str:
        """Where it is in a delivery."""
        return Stage.read(self.data_path / STAGE)

    def kill(self) -> None:
        """At once."""
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        """Of a process that has ended."""
        if self.process.stdin is not None:
            self.process.stdin.close()

    def freeze(self) -> None:
        """As if its machine hung, or its network were cut."""
        self.frozen = True
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on, and does not know that it was away."""
        self.process.send_signal(signal.SIGCONT)
        self.frozen = False


class Base:
    """The servers, the nursery and the inputs, which several worlds may share."""

    def __init__(self, folder: Path, stack: NativeStack, size: Size, nursery: Path) -> None:
        self.folder, self.stack, self.size, self.nursery = folder, stack, size, nursery
        self.locks = {"broker": asyncio.Lock(), "store": asyncio.Lock()}

    @property
    def servers(self) -> dict[str, Server]:
        """By name."""
        return {"broker": self.stack.kafka, "store": self.stack.minio}

    @property
    def pids(self) -> Path:
        """Where traps find the servers."""
        return self.folder / "pids"

    def note_pid(self, name: str) -> None:
        """For the traps."""
        self.pids.mkdir(exist_ok=True)
        (self.pids / name).write_text(str(self.servers[name].pid))

    async def end_server(self, name: str, seconds: float) -> None:
        """Kill a server and start it again after so long, on the same port and data."""
        async with self.locks[name]:
            server = self.servers[name]
            await asyncio.to_thread(server.kill)
            await asyncio.sleep(seconds)
            await asyncio.to_thread(server.start)
            self.note_pid(name)

    def is_down(self, name: str) -> bool:
        """Whether somebody else than `end_server` has killed the server."""
        if self.locks[name].locked():
            return False
        try:
            return psutil.Process(self.servers[name].pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Until the block ends, a server that was killed is started again."""
        keeping = asyncio.create_task(self._keep())
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    async def _keep(self) -> None:
        while True:
            for name in self.servers:
                if self.is_down(name):
                    await self.end_server(name, 0.3)
            await asyncio.sleep(0.1)


class World:
    """Workers of one group, and what they work on."""

    def __init__(self, base: Base, name: str, watch: Watch, settings: Settings) -> None:
        self.base, self.folder, self.settings, self.watch = base, base.folder / name, settings, watch
        self.store: Store = open_store(settings)
        self.requests = mixture(base.folder, base.size)
        self.workers: list[Worker] = []
        """All that ever lived."""
        self.asked: dict[str, str] = {}
        """Job to the name of its request."""
        self._lives: dict[int, int] = {}
        self._traps = 0

    @property
    def living(self) -> list[Worker]:
        """Workers that run."""
        return [worker for worker in self.workers if worker.alive]

    def trap(self, point: str, side: str, victim: str) -> Trap:
        """One that has not sprung."""
        marks = self.folder / "marks"
        marks.mkdir(exist_ok=True)
        self._traps += 1
        return Trap(point, side, victim, marks / f"{self._traps:04d}-{point}-{side}-{victim}", self.base.pids)

    def start_worker(self, slot: int, trap: Trap | None = None, *, cold: bool = False) -> Worker:
        """The next life of a slot; `cold`: its children are spawned as in production."""
        self._lives[slot] = life = self._lives.get(slot, 0) + 1
        name, data_path = f"w{slot}.{life}", self.folder / "data" / f"w{slot}"
        environment = child_environment() | self.base.stack.env()
        environment |= {
            "KAFKA_TOPIC_PREFIX": self.settings.kafka_topic_prefix,
            "KAFKA_GROUP_ID": self.settings.kafka_group_id,
            "KAFKA_REQUEST_PARTITIONS": str(self.settings.kafka_request_partitions),
            "KAFKA_SESSION_TIMEOUT_MS": str(self.base.size.session_seconds * 1000),
            "MINIO_BUCKET": self.settings.minio_bucket,
            "DATA_PATH": str(data_path),
            "API_HOST": "127.0.0.1",
            "API_PORT": "0",
            "MAX_CONCURRENT_JOBS": "1",
            "MAX_ATTEMPTS": "1000",
            "CHECKPOINT_SECONDS": "0.5",
            "GRACE_SECONDS": str(GRACE_SECONDS),
            "WORKER_ID": name,
            "LOCAL_MODEL_FOLDERS": f'["{self.base.folder}"]',
        }
        if not cold:
            environment[nursery.ADDRESS] = str(self.base.nursery)
        (data_path / TRAP).unlink(missing_ok=True)
        if trap is not None:
            trap.set(data_path)
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as file:
            command = [sys.executable, "-m", "tests.chaos.worker"]
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
            )
        worker = Worker(slot, name, process, data_path, log, trap)
        self.workers.append(worker)
        return worker

    async def ready(self, *workers: Worker, seconds: float = 60) -> None:
        """Until these take messages."""
        await until(lambda: all(worker.ready for worker in workers), seconds, "workers are ready")

    async def stop(self, worker: Worker) -> int | None:
        """Tell it to leave; its exit status, `None` if it does not go."""
        worker.process.terminate()
        try:
            return await asyncio.to_thread(worker.process.wait, GRACE_SECONDS + 15)
        except subprocess.TimeoutExpired:
            worker.kill()
            return None

    async def ask(self, job_id: str, kind: str) -> None:
        """Publish a request, once; waits for a broker that is away."""
        request = TrainRequested.model_validate(self.requests[kind] | {"job_id": job_id})
        record = record_for(request, source="/chaos", topics=self.settings.topics).as_dict()
        self.asked[job_id] = kind
        while True:
            # A client whose broker dies may wait for ever, and may swallow the cancellation by which a timeout ends it.
            asking = asyncio.create_task(self._ask(job_id, record))
            await asyncio.wait({asking}, timeout=ASK_SECONDS)
            if not asking.cancel() and not asking.cancelled():
                error = asking.exception()
                if error is None:
                    return
                if not isinstance(error, KafkaError | OSError | TimeoutError):
                    raise error
            await asyncio.sleep(0.5)  # it may be there or not

    async def _ask(self, job_id: str, record: dict[str, Any]) -> None:
        if not await self._is_asked(job_id):
            await publish(self.settings, record)

    async def _is_asked(self, job_id: str) -> bool:
        async with reading(self.settings, self.settings.topics.requested) as reader:
            return any(record.key == job_id.encode() for record in await reader.drained())

    def end_all(self) -> None:
        """Kill every worker that is left."""
        for worker in self.living:
            worker.thaw()
            worker.kill()
        for worker in self.workers:
            worker.close()


def child_environment() -> dict[str, str]:
    """Of workers and their children: offline, and one thread each."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KAFKA_", "MINIO_", "CHAOS_"))}
    return kept | threads | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


async def until(true: Callable[[], Any], seconds: float, what: str, every: float = 0.05) -> float:
    """Until it is true; seconds that it took.

    Raises:
        TimeoutError: if it does not become so.

    """
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        await asyncio.sleep(every)
    return time.monotonic() - began


async def until_async(true: Callable[[], Awaitable[bool]], seconds: float) -> None:
    """The same for what has to be asked for.

    Raises:
        TimeoutError: if it does not become so.

    """
    async with asyncio.timeout(seconds):
        while not await true():  # noqa: ASYNC110 - only the servers know
            await asyncio.sleep(0.2)


@asynccontextmanager
async def a_base(folder: Path, size: Size, address: Path | None = None) -> AsyncIterator[Base]:
    """Servers, ended with the block; `folder` stays. They may share another one's nursery."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # of a broker that is away, ten lines a second
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    with ExitStack() as held:
        stack = await asyncio.to_thread(held.enter_context, native_stack())
        if address is None:
            address = await asyncio.to_thread(held.enter_context, nursery.nursery(folder, child_environment()))
        base = Base(folder, stack, size, address)
        for name in base.servers:
            base.note_pid(name)
        await asyncio.to_thread(make_inputs, folder, size)
        yield base


@asynccontextmanager
async def a_world(base: Base, name: str = "chaos") -> AsyncIterator[World]:
    """Topics, a bucket with a corpus, and no worker yet; workers are ended with the block."""
    settings = Settings.model_validate(
        {name.lower(): value for name, value in base.stack.env().items()}
        | {
            "kafka_group_id": name,
            "kafka_topic_prefix": f"{name}.",
            "kafka_request_partitions": PARTITIONS,
            "minio_bucket": name,
        }
    )
    await kafka.ensure_topics(settings)
    async with watching(settings) as watch:
        world = World(base, name, watch, settings)
        await asyncio.to_thread(world.folder.mkdir)
        await asyncio.to_thread(world.store.ensure)
        await asyncio.to_thread(put_corpus, world.store, CORPUS, base.folder / CORPUS)
        try:
            yield world
        finally:
            world.end_all()
            world.store.close()
