"""A death before and after each step of a job's end, of the worker, its child and its servers: one end, exact files.

`CHAOS_TIMES=5` does each of them five times, and kills the broker also where nobody speaks to it but of progress.
"""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from mistudio_schemas import TrainCompleted

from .checker import Checker
from .conftest import lane
from .points import CHILD_POINTS, SIDES, WORKER_POINTS
from .results import digests
from .world import Base, World, a_base, until

pytestmark = pytest.mark.chaos

TIMES = int(os.environ.get("CHAOS_TIMES", "1"))
LANES = 2
KIND = "mean-standard"
ALL_CASES = [
    *((point, side, victim) for point in WORKER_POINTS for side in SIDES for victim in ("worker", "broker")),
    *((point, side, victim) for point in CHILD_POINTS for side in SIDES for victim in ("child", "worker", "broker")),
    ("answer", "after", "broker-soon"),
    ("object", "after", "store"),
    ("register", "before", "store"),
    ("register", "after", "store"),
    ("checkpoint-upload", "before", "store"),
]
FAR_FROM_THE_BROKER = ("upload", "object", "checkpoint-upload", "checkpoint")
CASES = [
    (point, side, victim)
    for point, side, victim in ALL_CASES
    if "CHAOS_TIMES" in os.environ or victim != "broker" or point not in FAR_FROM_THE_BROKER
]


def name_of(case: tuple[str, str, str], time: int) -> str:
    return f"{'-'.join(case)}-{time}"


@dataclass
class Died:
    """What became of one job."""

    sprung: bool
    ended: bool
    log: Path


@dataclass
class Deaths:
    """What became of all of them."""

    jobs: dict[str, Died]
    violations: list[str]


async def die(world: World, case: tuple[str, str, str], job: str) -> Died:
    """Let a job die at a point, bring up what has died, and wait for the job's end."""
    (worker,) = world.living
    trap = world.trap(*case)
    trap.set(worker.data_path)
    await world.ask(job, KIND)
    try:
        await until(lambda: trap.sprung, 90, f"{job} comes to its point")
        if case[2] == "worker":
            await until(lambda: not worker.alive and not worker.children, 5, f"all of {job} is dead")
            world.start_worker(1)
        await world.watch.ended({job}, 90)
    except TimeoutError:
        world.end_all()
        world.start_worker(1)
    return Died(trap.sprung, job in world.watch.ends, world.living[0].log)


async def run_lane(base: Base, number: int, cases: list[tuple[tuple[str, str, str], str]]) -> Deaths:
    async with lane(base, f"points-{number}") as world:
        await world.ask("undisturbed", KIND)
        await world.watch.ended({"undisturbed"}, 90)
        (done,) = world.watch.ends["undisturbed"]
        assert isinstance(done, TrainCompleted), done
        died = {job: await die(world, case, job) for case, job in cases}
        await world.stop(world.living[0])
        await world.ready(world.start_worker(1))  # clears away what the dead have left
        await world.stop(world.living[0])
        checked = await Checker(world, {KIND: digests(world.store, done)}).check()
        return Deaths(died, checked.violations)


async def run_server_lane(base: Base, number: int, cases: list[tuple[tuple[str, str, str], str]]) -> Deaths:
    """The same with servers of its own, which die."""
    folder = base.folder / f"servers-{number}"
    async with a_base(folder, base.size, base.nursery) as own, own.kept():
        return await run_lane(own, number, cases)


@pytest.fixture(scope="session")
async def deaths(base: Base, request: pytest.FixtureRequest) -> Deaths:
    """All that this session asks for, in lanes side by side: each waits most of the time."""
    wanted = {item.name.partition("[")[2].rstrip("]") for item in request.session.items}
    all_cases = [(case, name_of(case, time)) for time in range(TIMES) for case in CASES]
    cases = [(case, job) for case, job in all_cases if job in wanted]
    servers = [one for one in cases if one[0][2] not in ("worker", "child")]
    others = [one for one in cases if one not in servers]
    lanes = await asyncio.gather(
        *(run_lane(base, number, others[number::LANES]) for number in range(LANES)),
        *(run_server_lane(base, number, servers[number::LANES]) for number in range(LANES)),
    )
    died = {job: one for each in lanes for job, one in each.jobs.items()}
    return Deaths(died, [one for each in lanes for one in each.violations])


@pytest.mark.timeout(600 * TIMES)
@pytest.mark.parametrize("job", [name_of(case, time) for time in range(TIMES) for case in CASES])
async def test_a_job_that_dies_at_a_point_ends_once_with_exact_files(deaths: Deaths, job: str) -> None:
    died = deaths.jobs[job]
    assert died.sprung, f"nothing died: {died.log}"
    assert died.ended, f"it has not ended: {died.log}"
    assert [one for one in deaths.violations if one.startswith((f"{job} ", f"{job}:"))] == []


@pytest.mark.timeout(600 * TIMES)
async def test_nothing_is_left_when_all_have_died(deaths: Deaths) -> None:
    assert deaths.violations == []
