"""For tests: a Kafka in memory and a clock that jumps, so that hours of misfortune pass in milliseconds.

The broker keeps what the guarantee rests on: producers' epochs and fencing, open and prepared transactions, the last
stable offset, markers that are written one after another. Every call passes a gate, where it can be held up or fail.
"""

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

from aiokafka import TopicPartition
from aiokafka.errors import KafkaConnectionError, ProducerFenced
from aiokafka.structs import OffsetAndMetadata

Gate = Callable[[str], Awaitable[None]]
"""Told of each step before it is made; holds it up, or raises."""


class Loop(asyncio.SelectorEventLoop):
    """Its time is what the next timer says; threads' work is done at once."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Jumping(self))
        self.set_default_executor(_AtOnce())

    def time(self) -> float:
        """Seconds of its own."""
        return self._now

    def live(self, seconds: float) -> None:
        """Let so much of its time pass."""
        self.run_until_complete(asyncio.sleep(seconds))

    def finish(self) -> None:
        """End all that goes on."""
        tasks = asyncio.all_tasks(self)
        for task in tasks:
            task.cancel()
        self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.close()


class _Jumping(selectors.DefaultSelector):
    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout:
            self._loop._now += timeout
        return super().select(0)


class _AtOnce(ThreadPoolExecutor):
    def submit(self, call: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(call(*args, **options))
        except BaseException as error:
            done.set_exception(error)
        return done

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing is under way."""


@dataclass
class Entry:
    """A record in a log."""

    where: TopicPartition
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]
    state: Literal["open", "committed", "aborted"]


@dataclass
class Transaction:
    """Of one producer, not over yet."""

    entries: list[Entry] = field(default_factory=list)
    offsets: dict[TopicPartition, int] = field(default_factory=dict)
    prepared: bool = False
    """The coordinator has promised that it is committed."""


class Broker:
    """One broker with one partition of each topic."""

    def __init__(self) -> None:
        self.logs: dict[TopicPartition, list[Entry]] = {}
        self.offsets: dict[TopicPartition, int] = {}
        """The group's."""
        self.epochs: dict[str, int] = {}
        self.transactions: dict[str, Transaction] = {}
        self.unmarked: dict[str, list[Entry]] = {}
        """A producer's, of transactions whose end was forgotten: open until its next marker in their partition."""
        self.forgetful = False
        """It dies with the next transaction's end, whose answer it has given, and has forgotten it when it is back."""

    def log(self, where: TopicPartition) -> list[Entry]:
        """Of a partition."""
        return self.logs.setdefault(where, [])

    def stable_end(self, where: TopicPartition) -> int:
        """Up to where a read_committed reader sees."""
        log = self.log(where)
        return next((offset for offset, entry in enumerate(log) if entry.state == "open"), len(log))

    def begin_epoch(self, name: str) -> int:
        """Of a producer that starts: whatever its name has left open is over."""
        self.end(name)
        self.epochs[name] = self.epochs.get(name, 0) + 1
        return self.epochs[name]

    def end(self, name: str) -> None:
        """What was promised is committed, all else aborted."""
        if (transaction := self.transactions.get(name)) is None:
            return
        self.mark_entries(name)
        if transaction.prepared:
            self.mark_offsets(name)
        else:
            del self.transactions[name]

    def mark_entries(self, name: str) -> None:
        """The markers in the logs: of a commit the first half."""
        transaction = self.transactions[name]
        places = {entry.where for entry in transaction.entries}
        for entry in (*transaction.entries, *self.unmarked.get(name, ())):
            if entry.where in places and entry.state == "open":
                entry.state = "committed" if transaction.prepared else "aborted"

    def forget(self, name: str) -> None:
        """It has died with a commit's answer: offset and markers are lost, the records are not."""
        self.unmarked.setdefault(name, []).extend(self.transactions.pop(name).entries)
        self.forgetful = False

    def mark_offsets(self, name: str) -> None:
        """The other half."""
        self.offsets |= self.transactions.pop(name).offsets

    def expire(self, name: str) -> None:
        """A transaction that takes too long: its producer is fenced."""
        if name in self.transactions:
            self.begin_epoch(name)


class Producer:
    """What a delivery uses of aiokafka's."""

    def __init__(self, broker: Broker, gate: Gate, name: str) -> None:
        self._broker, self._gate, self._name, self._epoch = broker, gate, name, 0
        self._begun = False

    async def start(self) -> None:
        await self._gate("start")
        self._epoch = self._broker.begin_epoch(self._name)
        await self._gate("started")

    async def stop(self) -> None:
        """As aiokafka's: what is open stays open."""

    async def partitions_for(self, topic: str) -> set[int]:
        await self._gate("partitions")
        return {0}

    async def begin_transaction(self) -> None:
        await self._gate("begin")
        self._begun = True

    async def send_and_wait(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None,
        partition: int,
        headers: list[tuple[str, bytes]] | None = None,
    ) -> Any:
        await self._gate("send")
        entry = Entry(TopicPartition(topic, partition), key, value, list(headers or []), "open")
        self._open().entries.append(entry)
        log = self._broker.log(entry.where)
        log.append(entry)
        offset = len(log) - 1
        await self._gate("sent")
        return SimpleNamespace(offset=offset)

    async def send_offsets_to_transaction(self, offsets: dict[TopicPartition, OffsetAndMetadata], group: str) -> None:
        await self._gate("offsets")
        self._open().offsets |= {where: offset.offset for where, offset in offsets.items()}
        await self._gate("offsets sent")

    async def commit_transaction(self) -> None:
        await self._gate("commit")
        transaction = self._open()
        if self._broker.forgetful:
            self._broker.forget(self._name)
            return
        transaction.prepared = True
        await self._gate("prepared")
        if self._broker.transactions.get(self._name) is transaction:
            self._broker.mark_entries(self._name)
        await self._gate("half marked")
        if self._broker.transactions.get(self._name) is transaction:
            self._broker.mark_offsets(self._name)
        await self._gate("answer")
        self._begun = False

    async def abort_transaction(self) -> None:
        await self._gate("abort")
        self._require_epoch()
        if self._broker.forgetful and self._name in self._broker.transactions:
            self._broker.forget(self._name)
        else:
            self._broker.end(self._name)
        self._begun = False

    def _open(self) -> Transaction:
        self._require_epoch()
        if not self._begun:
            raise AssertionError("no transaction has begun")
        transaction = self._broker.transactions.setdefault(self._name, Transaction())
        if transaction.prepared:
            raise KafkaConnectionError("the last transaction is not over")
        return transaction

    def _require_epoch(self) -> None:
        if self._broker.epochs.get(self._name) != self._epoch:
            raise ProducerFenced


class Reader:
    """What a delivery uses of aiokafka's consumer without a group."""

    def __init__(self, broker: Broker, gate: Gate, committed: bool) -> None:
        self._broker, self._gate, self._committed = broker, gate, committed
        self._position: dict[TopicPartition, int] = {}

    async def start(self) -> None:
        await self._gate("reader")

    async def stop(self) -> None:
        """Nothing is held."""

    def assign(self, places: list[TopicPartition]) -> None:
        self._position = dict.fromkeys(places, 0)

    def seek(self, where: TopicPartition, offset: int) -> None:
        self._position[where] = offset

    async def position(self, where: TopicPartition) -> int:
        return self._position[where]

    async def end_offsets(self, places: list[TopicPartition]) -> dict[TopicPartition, int]:
        await self._gate("ends")
        if self._committed:
            return {where: self._broker.stable_end(where) for where in places}
        return {where: len(self._broker.log(where)) for where in places}

    async def getmany(self, where: TopicPartition, *, timeout_ms: int) -> dict[TopicPartition, list[Entry]]:
        await self._gate("read")
        if self._position[where] >= self._broker.stable_end(where):
            await asyncio.sleep(timeout_ms / 1000)
        start, end = self._position[where], self._broker.stable_end(where)
        self._position[where] = end
        found = [entry for entry in self._broker.log(where)[start:end] if entry.state == "committed"]
        return {where: found} if found else {}


class Group:
    """A worker's consumer: what it believes to have, which may be out of date."""

    def __init__(self, broker: Broker, gate: Gate) -> None:
        self._broker, self._gate = broker, gate
        self.believed: frozenset[TopicPartition] = frozenset()
        self.position: dict[TopicPartition, int] = {}

    def assignment(self) -> frozenset[TopicPartition]:
        return self.believed

    async def committed(self, partition: TopicPartition) -> int | None:
        await self._gate("committed")
        return self._broker.offsets.get(partition)

    async def commit(self, offsets: dict[TopicPartition, OffsetAndMetadata]) -> None:
        raise AssertionError("not with transactions")

    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        await self._gate("group ends")
        return {where: len(self._broker.log(where)) for where in partitions}

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self.position[partition] = offset


def forever() -> Coroutine[Any, Any, Literal[True]]:
    """What a worker does that has died."""
    return asyncio.Event().wait()
