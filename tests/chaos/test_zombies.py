"""A worker that is frozen until another one has its job, and then goes on as if nothing were: it changes nothing."""

import pytest
from aiokafka import ConsumerRecord

from mistudio_schemas import Contract, TrainCompleted, TrainProgress, parse_event
from tests.worker.bus import reading

from .checker import Checker
from .conftest import lane
from .world import Base, Worker, World, until

pytestmark = pytest.mark.chaos

KIND = "token-topk"
STOPPED = (
    "nothing more is written for it",
    "is no longer ours",
    "is another worker's now",
    "has lost",
    "run 1 is completed",
)
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


async def survive(world: World, when: str, job: str, *, past_the_end: bool) -> list[Contract]:
    """Freeze a worker and let it go on when another one has its job, or has ended it; everything said of the job."""
    (zombie,) = world.living
    await freeze(world, zombie, when, job)
    successor = world.start_worker(2)
    if past_the_end:
        await world.watch.ended({job}, 120)
    else:
        await world.watch.attempt_beyond(job, 1)
    zombie.thaw()
    await world.watch.ended({job}, 120)
    await until(lambda: any(said in zombie.log.read_text() for said in STOPPED), 60, "the zombie says it stops")
    folder = zombie.data_path / "cache" / "workspaces"
    await until(lambda: not zombie.children and not list(folder.glob("*")), 30, "the zombie has left nothing")
    assert await world.stop(successor) == 0
    assert await world.stop(zombie) == 0
    checked = await Checker(world, {}).check()
    assert checked.violations == []
    return [parse_event(record.value, record.headers) for record in await records_of(world, job)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("when", ["extracting:after", "training:after", "object:before", "manifest:before"])
async def test_a_zombie_ends_nothing_that_its_successor_has_begun(base: Base, when: str) -> None:
    async with lane(base, f"zombie-{when.replace(':', '-')}") as world:
        said = await survive(world, when, "job", past_the_end=False)
        (end,) = (event for event in said if isinstance(event, TrainCompleted))
        assert (end.attempt or 0) > 1
        assert progress_of(said)[-1].phase == "ended"


@pytest.mark.timeout(600)
async def test_a_zombie_between_begin_and_commit_finds_its_event_published_by_its_successor(base: Base) -> None:
    """The register had its end already: the successor published that, and trained nothing."""
    async with lane(base, "zombie-send") as world:
        said = await survive(world, "send:after", "job", past_the_end=True)
        (end,) = (event for event in said if isinstance(event, TrainCompleted))
        assert (end.attempt, end.worker) == (1, "w1.1")


@pytest.mark.timeout(600)
async def test_a_zombie_does_not_speak_over_its_successor(base: Base) -> None:
    async with lane(base, "zombie-speaks") as world:
        said = await survive(world, "training:after", "job", past_the_end=True)
        assert progress_of(said)[-1].phase == "ended"
        attempts = [event.attempt or 0 for event in progress_of(said)]
        assert attempts == sorted(attempts)


def progress_of(said: list[Contract]) -> list[TrainProgress]:
    return [event for event in said if isinstance(event, TrainProgress)]
