"""Hypothesis misleads two supervisors in every order it can think of: each message still ends once."""

import asyncio
import json
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mistudio_schemas import ErrorCode, TrainFailed
from mistudio_train.errors import StoreUnavailable
from mistudio_train.settings import Settings
from mistudio_train.worker import kafka
from mistudio_train.worker.deliveries import Deliveries, transactional_id
from mistudio_train.worker.intake import Intake, Message
from mistudio_train.worker.metrics import Metrics
from mistudio_train.worker.orders import Orders
from mistudio_train.worker.register import Claim
from mistudio_train.worker.runner import Runner
from mistudio_train.worker.store import DirectoryStore
from mistudio_train.worker.supervisor import Supervisor

from .simulation import Broker, Group, Loop, Producer, Reader, forever

CONFIG = Settings(kafka_group_id="group")
TOPICS = CONFIG.topics
SOURCE = TopicPartition(TOPICS.requested, 0)
ENDS = [TopicPartition(topic, 0) for topic in (TOPICS.completed, TOPICS.failed, TOPICS.cancelled, TOPICS.dead_letter)]
WORKERS = 2
KAFKA_STEPS = (
    *("start", "started", "partitions", "begin", "send", "sent", "offsets", "offsets sent", "commit", "prepared"),
    *("half marked", "answer", "abort", "reader", "ends", "read", "committed", "group ends"),
)
TURNS = ("committed", "ends", "send", "commit", "prepared", "half marked", "answer", "run", "ran")
"""Steps where it matters that another worker comes between."""
STORE_STEPS = ("put_if_absent", "put_if_match", "get_bytes", "delete", "folders")
A_WHILE = 3.0
"""Seconds of a message's life that nothing holds up."""
LONG = 120.0
"""Seconds in which all that can happen has happened."""


class Store(DirectoryStore):
    """A store whose calls may fail, before or after they did what was asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fails: dict[str, bool] = {}
        """Call to whether its work is done nevertheless."""

    def __getattribute__(self, name: str) -> Any:
        call = super().__getattribute__(name)
        if name not in STORE_STEPS or name not in self.fails:
            return call

        def fail(*args: Any) -> None:
            if self.fails.pop(name):
                call(*args)
            raise StoreUnavailable("it is away", "Wait.")

        return fail


class Worker:
    """A slot with its supervisor, which does what it is told by a group that tells it late."""

    def __init__(self, number: int, broker: Broker, store: Store, loop: Loop) -> None:
        self.name, self._broker = f"w{number}", broker
        self.fails: dict[str, bool] = {}
        self.cancels = False
        """Its next run."""
        self.frozen_at: set[str] = set()
        self.thawed = asyncio.Event()
        self.thawed.set()
        self.dead = False
        self.group = Group(broker, self.gate)
        self.deliveries = Deliveries(CONFIG, cast("Any", self.group))
        self._wake = asyncio.Event()
        self._handling: asyncio.Task[None] | None = None
        config = CONFIG.model_copy(update={"worker_id": self.name})
        self._supervisor = Supervisor(config, store, Metrics(), cast("Runner", _Runner(self)))
        self._living = loop.create_task(self._live())

    async def gate(self, step: str) -> None:
        """Where all that befalls a worker befalls it."""
        await asyncio.sleep(0)
        if self.dead:
            await forever()
        if step in self.frozen_at:
            self.frozen_at.discard(step)
            self.thawed.clear()
        await self.thawed.wait()
        if self.dead:
            await forever()
        if step in self.fails:
            del self.fails[step]
            raise KafkaConnectionError(f"fails at {step}")

    def told(self, assigned: frozenset[TopicPartition], position: int) -> None:
        """As a slot is, after a rebalance."""
        self.deliveries.doubt()
        kept = self.group.believed & assigned
        self.group.believed = assigned
        if self._handling is not None and not assigned:
            self._handling.cancel()
        if not kept:
            self.group.position = dict.fromkeys(assigned, position)
        self._wake.set()

    def look(self) -> None:
        """There may be a new message."""
        self._wake.set()

    async def _live(self) -> None:
        while True:
            message = self._next()
            if message is None:
                await self._wake.wait()
                self._wake.clear()
                continue
            self._handling = asyncio.create_task(self._supervisor.handle(message, self.deliveries, Orders()))
            await asyncio.wait([self._handling])
            self._handling = None

    def _next(self) -> Message | None:
        position, log = self.group.position.get(SOURCE, 0), self._broker.log(SOURCE)
        if self.dead or SOURCE not in self.group.believed or position >= len(log):
            return None
        self.group.position[SOURCE] = position + 1
        return Message(SOURCE.topic, 0, position, 1_700_000_000_000, log[position].key, log[position].value, ())


class _Runner:
    """In place of children: a run ends when its worker's gate lets it."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.controls = SimpleNamespace(caught_up=self._caught_up, read_to={0: 0})

    async def _caught_up(self) -> None:
        await self._worker.gate("controls")

    def take_on(self, claim: Claim, message: Message, intake: Intake, orders: Orders) -> Any:
        feed = SimpleNamespace(close=self._closed)
        return SimpleNamespace(claim=claim, intake=intake, identity=None, feed=feed, orders=orders)

    async def _closed(self, **_: Any) -> None:
        """Nobody listens."""

    async def tell_end(self, _: Any) -> None:
        """Nobody listens."""

    async def end_of(self, running: Any) -> TrainFailed:
        await self._worker.gate("run")
        await asyncio.sleep(1)
        if self._worker.cancels:
            self._worker.cancels = False
            running.orders.give("cancel")
        await self._worker.gate("ran")
        record = running.claim.record
        return TrainFailed(
            job_id=record.job_id,
            run=record.run,
            attempt=running.claim.attempt,
            worker=self._worker.name,
            code=ErrorCode.CORPUS_EMPTY,
            hint="another",
            retryable=False,
            message="no",
        )


class Misfortunes(RuleBasedStateMachine):
    """One partition, two workers, and everything that may happen to them."""

    workers = st.integers(0, WORKERS - 1)

    def __init__(self) -> None:
        super().__init__()
        self.loop = Loop()
        self.folder = tempfile.TemporaryDirectory(prefix="mistudio-machine-")
        self.broker, self.store = Broker(), Store(Path(self.folder.name))
        self.expected: Counter[bytes] = Counter()
        """Message's key to its ends."""
        self.owner = 0
        self.lives = 0
        clients = mock.patch.multiple(kafka, producer=self._producer, reader=self._reader)
        clients.start()
        self.clients = clients
        self.all: list[Worker] = []
        self.living = [self._begin() for _ in range(WORKERS)]

    def _begin(self) -> Worker:
        self.lives += 1
        worker = Worker(self.lives, self.broker, self.store, self.loop)
        self.all.append(worker)
        return worker

    def _gate_of_caller(self) -> Any:
        """Clients are made by the task of the worker that is about to use them."""
        task = asyncio.current_task()
        return next(worker.gate for worker in self.all if worker._handling is task)

    def _producer(self, _: Settings, name: str | None = None) -> Any:
        assert name == transactional_id(CONFIG, SOURCE)
        return Producer(self.broker, self._gate_of_caller(), name)

    def _reader(self, _: Settings, isolation: kafka.Isolation = "read_committed") -> Any:
        return Reader(self.broker, self._gate_of_caller(), isolation == "read_committed")

    def _tell(self, worker: Worker) -> None:
        mine = worker is self.living[self.owner]
        position = self.broker.offsets.get(SOURCE, 0)
        worker.told(frozenset({SOURCE}) if mine else frozenset(), position)

    @initialize()
    def share_out(self) -> None:
        self._tell(self.living[self.owner])

    @rule(garbage=st.booleans(), holds=st.lists(st.sampled_from([None, *TURNS]), min_size=WORKERS, max_size=WORKERS))
    def ask(self, garbage: bool, holds: list[str | None]) -> None:
        """One more message, and where each worker is held up that tries it."""
        for worker, step in zip(self.living, holds, strict=True):
            worker.frozen_at |= {step} if step else set()
        log = self.broker.log(SOURCE)
        key = f"job-{len(log)}".encode()
        fields = {"model_name": "m", "corpus_file": "c.txt", "job_id": key.decode()}
        asker = Producer(self.broker, _open_gate, "asker")
        value = b"garbage" if garbage else json.dumps(fields).encode()
        self.loop.run_until_complete(_send(asker, key, value))
        self.expected[key] = 1
        for worker in self.living:
            worker.look()
        self.loop.live(A_WHILE)

    @rule(seconds=st.sampled_from([0.02, 0.5, 20.0]))
    def live(self, seconds: float) -> None:
        self.loop.live(seconds)

    @rule(worker=workers, step=st.sampled_from([None, *TURNS]))
    def go_on(self, worker: int, step: str | None) -> None:
        """A worker that stood still; up to that step."""
        self.living[worker].frozen_at |= {step} if step else set()
        self.living[worker].thawed.set()
        self.loop.live(A_WHILE)

    @rule(worker=workers, step=st.sampled_from(KAFKA_STEPS))
    def fail(self, worker: int, step: str) -> None:
        """Its call or its answer is lost, the next time that it comes to that step."""
        self.living[worker].fails[step] = True

    @rule(worker=workers)
    def cancel(self, worker: int) -> None:
        """Its next run."""
        self.living[worker].cancels = True

    @rule(call=st.sampled_from(STORE_STEPS), done=st.booleans())
    def fail_store(self, call: str, done: bool) -> None:
        self.store.fails[call] = done

    @rule(told=st.booleans())
    def rebalance(self, told: bool) -> None:
        """The new owner hears of it at once, the old one later, or now."""
        former, self.owner = self.owner, 1 - self.owner
        self._tell(self.living[self.owner])
        if told:
            self._tell(self.living[former])

    @rule(worker=workers)
    def tell(self, worker: int) -> None:
        self._tell(self.living[worker])

    @rule(worker=workers)
    def kill(self, worker: int) -> None:
        """And another one comes in its place."""
        self.living[worker].dead = True
        self.living[worker] = self._begin()
        self._tell(self.living[worker])

    @rule()
    def forget_next_commit(self) -> None:
        self.broker.forgetful = True

    @rule()
    def time_out_transaction(self) -> None:
        self.broker.expire(transactional_id(CONFIG, SOURCE))

    def _in_peace(self) -> None:
        """Nobody is inside, and nothing is left open: only then an operator may touch the group's offsets."""
        for worker in self.living:
            worker.dead = True
        self.broker.begin_epoch(transactional_id(CONFIG, SOURCE))

    def _begin_all(self) -> None:
        self.living = [self._begin() for _ in range(WORKERS)]
        self._tell(self.living[self.owner])

    @precondition(lambda self: self.ends() == self.expected and SOURCE in self.broker.offsets)
    @rule()
    def forget_offsets(self) -> None:
        """Kafka does after a week without members: nothing is to run again for that."""
        self._in_peace()
        self.broker.offsets.pop(SOURCE, None)
        self._begin_all()

    @precondition(lambda self: SOURCE in self.broker.offsets)
    @rule()
    def rewind(self) -> None:
        """An operator sets the group back: what has ended is to run again."""
        self._in_peace()
        ended = self.ends()
        for offset, entry in enumerate(self.broker.log(SOURCE)):
            assert entry.key is not None
            if offset < self.broker.offsets[SOURCE] and ended[entry.key] == self.expected[entry.key]:
                self.expected[entry.key] += 1
        self.broker.offsets[SOURCE] = 0
        self._begin_all()

    def ends(self) -> Counter[bytes]:
        """What a read_committed reader finds, by the message's key."""
        found = [entry for where in ENDS for entry in self.broker.log(where) if entry.state == "committed"]
        return Counter(entry.key or b"" for entry in found)

    @invariant()
    def nothing_ends_twice_or_runs_in_vain(self) -> None:
        ends = self.ends()
        for key, expected in self.expected.items():
            assert ends[key] <= expected, f"{key!r} has {ends[key]} ends"
            runs = list(DirectoryStore.folders(self.store, f"jobs/{key.decode()}/runs/"))
            assert len(runs) <= expected, f"{key!r} has the runs {runs}"

    def teardown(self) -> None:
        """When all is well again, each message has its end, and the group has passed all."""
        try:
            self.store.fails.clear()
            self.broker.forgetful = False
            for worker in self.living:
                worker.frozen_at.clear()
                worker.fails.clear()
                worker.thawed.set()
            for worker in self.living:
                self._tell(worker)
            for _ in range(4 * len(self.expected) + 4):
                self.loop.live(LONG)
                self.broker.expire(transactional_id(CONFIG, SOURCE))
                for worker in self.living:
                    worker.look()
            assert self.ends() == self.expected
            if self.expected:
                assert self.broker.offsets[SOURCE] == len(self.expected)
        finally:
            self.clients.stop()
            self.loop.finish()
            self.folder.cleanup()


async def _open_gate(_: str) -> None:
    """Lets everybody through."""


async def _send(asker: Producer, key: bytes, value: bytes) -> None:
    await asker.start()
    await asker.begin_transaction()
    await asker.send_and_wait(SOURCE.topic, value, key=key, partition=0)
    await asker.commit_transaction()


TestMisfortunes = Misfortunes.TestCase
TestMisfortunes.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
