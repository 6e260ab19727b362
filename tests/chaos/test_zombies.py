"""A worker that is frozen until another one has its job, and then goes on as if nothing were: it changes nothing."""

import pytest
from aiokafka import ConsumerRecord

from mistudio_schemas import TrainCompleted, TrainProgress, parse_event
from tests.worker.bus import reading

from .checker import Checker
from .conftest import lane
from .world import Base, Worker, World, until

KIND = "token-topk"
STOPPED = ("nothing more is written for it", "is no longer ours", "is another worker's now", "has lost")
"""What a worker says that has lost a job."""


async def freeze(world: World, worker: Worker, when: str, job: str) -> None:
    """Until the worker stands still in the job."""
    point, _, side = when.partition(":")
    trap = world.trap(point, side, "frozen")
    trap.set(worker.data_path)
    await world.ask(job, KIND)
    await until(lambda: trap.sprung, 90, f"the worker comes to {when}")
    worker.frozen = True


async def records_of(world: World, job: str) -> list[ConsumerRecord]:
    topics = world.settings.topics
    async with reading(world.settings, topics.progress, topics.completed, topics.failed) as reader:
        return [record for record in await reader.drained() if record.key == job.encode()]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "when", ["extracting:after", "training:after", "object:before", "manifest:before", "send:after"]
)
async def test_a_zombie_writes_nothing_that_anybody_can_reach(base: Base, when: str) -> None:
    name = when.replace(":", "-")
    async with lane(base, f"zombie-{name}") as world:
        (zombie,), job = world.living, f"job-{name}"
        await freeze(world, zombie, when, job)
        successor = world.start_worker(2)
        if when == "send:after":  # the register says how it has ended: the successor publishes that, and runs nothing
            await world.watch.ended({job}, 120)
        else:
            await world.watch.attempt_beyond(job, 1)
        zombie.thaw()
        await world.watch.ended({job}, 120)
        await until(lambda: any(said in zombie.log.read_text() for said in STOPPED), 60, "the zombie says it stops")
        await until(lambda: not zombie.children, 30, "the zombie's child is gone")
        folder = zombie.data_path / "cache" / "workspaces"
        await until(lambda: not list(folder.glob("*")), 30, "the zombie's workspace is gone")
        assert await world.stop(successor) == 0
        assert await world.stop(zombie) == 0
        checked = await Checker(world, {}).check()
        assert checked.violations == []
        said = [parse_event(record.value, record.headers) for record in await records_of(world, job)]
        (end,) = (event for event in said if isinstance(event, TrainCompleted))
        assert (end.attempt, end.worker) == ((1, zombie.name) if when == "send:after" else (2, successor.name))
        speakers = [event.worker for event in said if isinstance(event, TrainProgress)]
        if successor.name in speakers:
            assert zombie.name not in speakers[speakers.index(successor.name) :]
