"""A campaign: undisturbed jobs first, then the same ones while everything dies, then peace, and the checks."""

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mistudio_schemas import TrainCompleted

from . import table
from .checker import Checked, Checker
from .deeds import Deeds
from .mixture import SIZES
from .results import digests
from .world import World, a_base, a_world

OUTSTANDING = 6
"""Jobs that wait or run at any time."""
END_SECONDS = 900.0
"""In which all jobs end when nothing dies any more."""


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    size: str
    seed: int
    pause: tuple[float, float]
    """Seconds between two deeds, from and to."""
    jobs: int = 0
    """At least so many."""
    kills: int = 0
    """At least so many."""
    seconds: float = 0.0
    """At least so long."""
    at_most_seconds: float = float("inf")
    kills_a_job: int = 6
    """After so many kills without a job's end there is a pause until one ends: on a slow machine none would else."""
    slots: int = 3
    restart_seconds: float = 2.0
    cold: float = 0.0
    """Share of workers whose children are spawned as in production."""
    trapped: float = 0.9
    """Share of workers that begin with a trap."""


async def run(plan: Plan, folder: Path, repeat: str, say: Callable[[str], None] = print) -> table.Outcome:
    """Do it; `folder` keeps logs and data."""
    async with a_base(folder, SIZES[plan.size]) as base, a_world(base) as world:
        began = time.monotonic()
        references, seconds = await _undisturbed(world)
        say(f"{len(references)} undisturbed jobs, {time.monotonic() - began:.0f} s; now everything dies")
        deeds = await _disturbed(world, plan, say)
        checked = Checked()
        with suppress(TimeoutError):
            await world.watch.ended(set(world.asked), END_SECONDS)
        await deeds.stop_keeping()
        checked = await _in_peace(world, deeds, references)
        return table.Outcome(
            seed=plan.seed,
            seconds=time.monotonic() - began,
            reference_seconds=seconds,
            checkpoints=table.checkpoints(world),
            deeds=deeds.done,
            checked=checked,
            resumed=table.resumed(world),
            steps_lost=table.steps_lost(world),
            repeat=repeat,
        )


async def _undisturbed(world: World) -> tuple[dict[str, dict[str, str]], list[float]]:
    """Digests of each request's result, by its name, and the seconds that the jobs took."""
    workers = [world.start_worker(1), world.start_worker(2)]
    await world.ready(*workers)
    jobs = {f"undisturbed-{kind}": kind for kind in world.requests}
    for job, kind in jobs.items():
        await world.ask(job, kind)
    await world.watch.ended(set(jobs), END_SECONDS)
    done = {kind: world.watch.ends[job][0] for job, kind in jobs.items()}
    completed = {kind: event for kind, event in done.items() if isinstance(event, TrainCompleted)}
    if len(completed) < len(done):
        raise RuntimeError(f"undisturbed jobs do not complete: {done}")
    seconds = [event.duration_seconds or 0.0 for event in completed.values()]
    return {kind: digests(world.store, event) for kind, event in completed.items()}, seconds


async def _disturbed(world: World, plan: Plan, say: Callable[[str], None]) -> Deeds:
    rng, began = random.Random(plan.seed), time.monotonic()
    deeds = Deeds(world, rng, plan.slots, plan.restart_seconds, plan.cold, plan.trapped)
    deeds.begin_keeping()
    enough_asked = asyncio.Event()
    asking = asyncio.create_task(_keep_asking(world, random.Random(plan.seed), enough_asked))
    said, last_end = 0, (0, 0)
    try:
        while True:
            elapsed, jobs = time.monotonic() - began, len(world.asked)
            enough = jobs >= plan.jobs and deeds.kills >= plan.kills and elapsed >= plan.seconds
            if enough or elapsed > plan.at_most_seconds:
                break
            if deeds.kills >= said + 20:
                said = deeds.kills
                say(f"{elapsed:.0f} s: {said} kills, {len(world.watch.ends)} of {jobs} jobs have ended")
            ended = len(world.watch.ends)
            if ended > last_end[0]:
                last_end = ended, deeds.kills
            if deeds.kills - last_end[1] < plan.kills_a_job:
                await deeds.do()
            await asyncio.sleep(rng.uniform(*plan.pause))
            if asking.done():
                await asking
    except BaseException:
        asking.cancel()
        raise
    enough_asked.set()
    await deeds.calm()
    await asking  # to its end: a request that is half sent would be waited for
    say(f"{time.monotonic() - began:.0f} s: {deeds.kills} kills; now peace")
    return deeds


async def _keep_asking(world: World, rng: random.Random, enough: asyncio.Event) -> None:
    """For jobs, so that some wait at any time."""
    kinds, number = list(world.requests), 0
    while not enough.is_set():
        waiting = [job for job in world.asked if job not in world.watch.ends]
        if len(waiting) < OUTSTANDING:
            number += 1
            await world.ask(f"job-{number:04d}", rng.choice(kinds))
        else:
            await asyncio.sleep(0.1)


async def _in_peace(world: World, deeds: Deeds, references: dict[str, dict[str, str]]) -> Checked:
    """Every worker is stopped in good order, and each slot's next one, which clears away what the dead have left."""
    await _stop_all(world, deeds)
    slots = sorted({worker.slot for worker in world.workers})
    await world.ready(*[world.start_worker(slot) for slot in slots])
    await _stop_all(world, deeds)
    checked = await Checker(world, references).check()
    checked.violations[:0] = deeds.violations
    return checked


async def _stop_all(world: World, deeds: Deeds) -> None:
    living = world.living
    statuses = await asyncio.gather(*(world.stop(worker) for worker in living))
    for worker, status in zip(living, statuses, strict=True):
        if status != 0:
            deeds.violations.append(f"{worker.name} ended with status {status} when it was told to stop: {worker.log}")
