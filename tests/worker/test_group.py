"""Workers that come, go and die beside a running job, on a real Kafka: it is begun once, and nobody idles meanwhile."""

import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest
from aiokafka import ConsumerRecord
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor

from mistudio_schemas import TrainCompleted
from mistudio_train.settings import Settings
from mistudio_train.worker.assignor import BusyAwareAssignor
from mistudio_train.worker.child_main import Job

from . import jobs
from .bus import Reader, events, publish, reading, request, running_worker

Assignor = Callable[[Any], Any]

ANOTHER_WORKER = """
import asyncio, sys
from mistudio_train.settings import Settings
from tests.worker import jobs
from tests.worker.bus import running_worker
async def main():
    async with running_worker(Settings(), jobs.works_until_told):
        print("joined", flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


def stock(_: Any) -> Any:
    """The assignor of a worker that knows nothing of busy partitions."""
    return RoundRobinPartitionAssignor


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Of a worker with one slot, whose death its group notices in a second or two."""
    return settings.model_copy(update={"max_concurrent_jobs": 1, "kafka_session_timeout_ms": 2000})


@asynccontextmanager
async def worker(
    settings: Settings, name: str, job: Job = jobs.works_until_told, assignor: Assignor = BusyAwareAssignor
) -> AsyncIterator[None]:
    """A worker by that name; the stock assignor gives partitions in the order of names."""
    async with running_worker(settings.model_copy(update={"worker_id": name}), job, assignor):
        yield


@contextmanager
def process(env: dict[str, str], settings: Settings, name: str) -> Iterator[subprocess.Popen[str]]:
    """A worker that is a process, when it has joined."""
    own = {
        "WORKER_ID": name,
        "MAX_CONCURRENT_JOBS": "1",
        "KAFKA_SESSION_TIMEOUT_MS": str(settings.kafka_session_timeout_ms),
        "PYTHONPATH": ":".join(path for path in sys.path if path),
    }
    command = [sys.executable, "-c", ANOTHER_WORKER]
    with subprocess.Popen(command, env=env | own, text=True, stdout=subprocess.PIPE) as started:
        try:
            assert started.stdout is not None
            assert started.stdout.readline() == "joined\n"
            yield started
        finally:
            started.kill()


def begun(settings: Settings, job_id: str) -> int:
    """How often the job was."""
    return len(list(settings.data_path.parent.glob(f"begun-{job_id}-*")))


def let_go(settings: Settings) -> None:
    (settings.data_path.parent / "go").touch()


async def until_begun(reader: Reader, topic: str, times: int = 1) -> None:
    def enough(records: list[ConsumerRecord]) -> bool:
        return len([one for one in records if one.topic == topic and b"has begun" in one.value]) >= times

    await reader.until(enough)


async def test_a_running_job_survives_who_comes_who_goes_and_who_dies(
    settings: Settings, worker_env: dict[str, str]
) -> None:
    topics = settings.topics
    await publish(settings, request("long", settings, partition=3))
    async with worker(settings, "b"), reading(settings, topics.progress, topics.completed) as reader:
        await until_begun(reader, topics.progress)
        async with worker(settings, "a"), worker(settings, "c"):
            pass
        with process(worker_env, settings, "d") as another:
            another.kill()
        async with worker(settings, "a"):  # has joined when the group has noticed
            let_go(settings)
            (done,) = events(await reader.of(topics.completed, 1))
    assert isinstance(done, TrainCompleted)
    assert (done.worker, done.attempt, begun(settings, "long")) == ("b", 1, 1)


async def test_with_the_stock_assignor_the_same_job_is_stopped(settings: Settings) -> None:
    topics = settings.topics
    await publish(settings, request("long", settings, partition=3))
    async with reading(settings, topics.progress, topics.completed) as reader, AsyncExitStack() as workers:
        await workers.enter_async_context(worker(settings, "b", assignor=stock))
        await until_begun(reader, topics.progress)
        await workers.enter_async_context(worker(settings, "c", assignor=stock))
        await until_begun(reader, topics.progress, 2)
        let_go(settings)
        (done,) = events(await reader.of(topics.completed, 1))
    assert isinstance(done, TrainCompleted)
    assert (done.worker, done.attempt, begun(settings, "long")) == ("c", 2, 2)


@pytest.mark.parametrize("first", ["ours", "stock"])
async def test_in_a_mixed_group_that_changes_every_message_ends_once(settings: Settings, first: str) -> None:
    """The first member leads the group: each of the two has to get along with the other's answers."""
    topics, names = settings.topics, [f"job-{number}" for number in range(8)]
    kinds: list[Assignor] = [BusyAwareAssignor, stock] if first == "ours" else [stock, BusyAwareAssignor]
    await publish(settings, *(request(name, settings, partition=number % 4) for number, name in enumerate(names)))
    async with reading(settings, topics.completed, topics.failed) as reader:
        async with worker(settings, "b", jobs.works, kinds[0]):
            async with worker(settings, "a", jobs.works, kinds[1]):
                await reader.of(topics.completed, 2)
                async with worker(settings, "c", jobs.works, kinds[0]):
                    await reader.of(topics.completed, 4)
            await reader.of(topics.completed, 8)
        ended = events(await reader.drained())
    assert Counter(one.job_id for one in ended) == dict.fromkeys(names, 1)  # type: ignore[attr-defined]
    assert all(isinstance(one, TrainCompleted) for one in ended)


async def test_what_waits_behind_a_busy_worker_an_idle_one_does(settings: Settings) -> None:
    topics = settings.topics
    async with (
        worker(settings, "a", jobs.holds_up_only_the_first),
        worker(settings, "b", jobs.holds_up_only_the_first),
        reading(settings, topics.progress, topics.completed) as reader,
    ):
        await publish(settings, request("long", settings, partition=0))
        await until_begun(reader, topics.progress)
        # of these one is in the busy worker's other partition
        await publish(settings, *(request(f"short-{number}", settings, partition=number) for number in (1, 2, 3)))
        done = events(await reader.of(topics.completed, 3))
        let_go(settings)
        (*_, last) = events(await reader.of(topics.completed, 4))
    assert {one.job_id for one in done} == {"short-1", "short-2", "short-3"}  # type: ignore[attr-defined]
    assert isinstance(last, TrainCompleted)
    assert (last.job_id, last.attempt, begun(settings, "long")) == ("long", 1, 1)
