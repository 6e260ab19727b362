"""What is done to workers, their children and their servers, at random from a seed, and who starts them again.

Every deed is recorded with where its victim's job was at that moment.
"""

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil

from . import points
from .worker import Child
from .world import CHILD_GONE_SECONDS, Worker, World, until

EARLY_TRAPS = ("fetching:after", *(f"{phase}:after" for phase in points.PHASE_POINTS))
UPLOAD_TRAPS = ("upload:before", "object:before", "object:after", "upload:after", "manifest:before")
LATE_TRAPS = tuple(f"{point}:{side}" for point in points.POINTS for side in points.SIDES)
TRAP_VICTIMS = (*["worker"] * 12, "broker", "broker-soon")
STAGES = {
    "fetching": ("accepting", "fetching", "planning"),
    "loading": ("loading",),
    "extracting": ("extracting",),
    "training": ("training", "checkpoint", "checkpoint-upload"),
    "exporting": ("evaluating", "exporting"),
    "uploading": ("uploading", "upload", "object", "manifest:before"),
    "delivering": ("publishing", "manifest:after", *points.BETWEEN_MANIFEST_AND_READ_BACK, "read-back:before"),
}
"""From phases and named points to what a worker does then; `delivering` is between manifest and read-back."""
TAKEN_OVER_SECONDS = 20.0
"""Within this long another worker takes over what a frozen one had; else it just goes on."""
KILLS = ("worker", "child", "both", "broker", "store")


@dataclass(frozen=True)
class Deed:
    """Something done to somebody."""

    at: float
    """Seconds since the beginning."""
    kind: str
    victim: str
    job: str
    phase: str
    """Of the victim's job: of its progress, or which named point it has passed last."""

    @property
    def is_kill(self) -> bool:
        """Whether somebody died without a warning."""
        return self.kind in KILLS

    @property
    def stage(self) -> str:
        """What the victim was doing."""
        names = self.phase, self.phase.partition(":")[0]
        return next((stage for stage, phases in STAGES.items() if any(name in phases for name in names)), "idle")


class Deeds:
    """Does them, and keeps as many workers alive as there are slots.

    Args:
        slots: of workers.
        restart_seconds: within this long of its end a worker is started again.
        cold: share of workers whose children are spawned as in production.
        trapped: share of workers that begin with a trap at a named point: moments too short for chance to hit often.

    """

    def __init__(
        self, world: World, rng: random.Random, slots: int, restart_seconds: float, cold: float, trapped: float
    ) -> None:
        self._world, self._rng = world, rng
        self._slots = list(range(1, slots + 1))
        self._restart_seconds, self._cold, self._trapped = restart_seconds, cold, trapped
        self._began = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting: set[int] = set()
        self._quiet = False
        self.done: list[Deed] = []
        self.violations: list[str] = []

    @property
    def kills(self) -> int:
        """So far."""
        return sum(deed.is_kill for deed in self.done)

    def begin_keeping(self) -> None:
        """From now on whatever has died is started again."""
        self._keeping = asyncio.create_task(self._keep())

    async def stop_keeping(self) -> None:
        """Whatever dies stays dead."""
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _keep(self) -> None:
        while True:
            for name in self._world.base.servers:
                if self._world.base.is_down(name):
                    self._note_sprung(name)
                    self._spawn(self._world.base.end_server(name, self._rng.uniform(0, 1)))
                    await asyncio.sleep(0)
            for slot in self._slots:
                if slot not in self._starting and not any(one.slot == slot for one in self._world.living):
                    self._starting.add(slot)
                    self._spawn(self._start(slot))
            await asyncio.sleep(0.1)

    async def calm(self) -> None:
        """No more deeds: those under way end, and no trap springs any more."""
        self._quiet = True
        for worker in self._world.living:
            if worker.trap is not None and not worker.trap.sprung:
                worker.trap.mark.touch()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def do(self) -> None:
        """One of them, if it can be done now."""
        kinds: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "worker": (5, self._kill_worker),
            "child": (6, self._kill_child),
            "both": (2, self._kill_both),
            "broker": (1, lambda: self._kill_server("broker")),
            "store": (1, lambda: self._kill_server("store")),
            "freeze": (1, self._freeze),
            "term": (1, self._terminate),
            "join": (1, self._join),
        }
        weights = [weight for weight, _ in kinds.values()]
        _, deed = self._rng.choices(list(kinds.values()), weights)[0]
        await deed()

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.violations.append(f"a defect of the harness: {error!r}")

    def _victim(self, *, with_child: bool = False) -> Worker | None:
        there = [one for one in self._world.living if not one.frozen and one.ended_by is None and one.ready]
        if with_child:
            there = [one for one in there if one.children]
        busy = [one for one in there if self._world.watch.phase_of(one.name)[0]]
        chosen = busy if busy and self._rng.random() < 0.85 else there
        return self._rng.choice(chosen) if chosen else None

    def _note(self, kind: str, worker: Worker | None) -> None:
        job, phase, victim = "", "idle", kind
        if worker is not None:
            victim = worker.name
            job, phase = self._world.watch.phase_of(worker.name)
            stage = worker.stage
            if stage and not stage.startswith("attempt") and stage != "read-back:after":
                phase = stage
        self.done.append(Deed(time.monotonic() - self._began, kind, victim, job, phase))

    def _note_sprung(self, server: str) -> None:
        """A server was killed by a trap."""
        traps = [one for one in self._world.workers if one.trap is not None and one.trap.sprung]
        mine = [one for one in traps if one.trap is not None and one.trap.victim.startswith(server)]
        last = max(mine, key=lambda one: one.trap.mark.stat().st_mtime if one.trap else 0.0, default=None)
        if last is None or last.trap is None:
            self.violations.append(f"the {server} died and nobody has killed it: see {self._world.folder}")
            return
        self._note_trap(server, last)

    def _note_trap(self, kind: str, worker: Worker) -> None:
        assert worker.trap is not None  # it has sprung
        job, _ = self._world.watch.phase_of(worker.name)
        phase = f"{worker.trap.point}:{worker.trap.side}"
        self.done.append(Deed(time.monotonic() - self._began, kind, worker.name, job, phase))

    async def _kill_worker(self) -> None:
        if (worker := self._victim()) is None:
            return
        self._note("worker", worker)
        worker.ended_by = "worker"
        worker.kill()

    async def _kill_child(self) -> None:
        if (worker := self._victim(with_child=True)) is not None and (children := worker.children):
            self._note("child", worker)
            _kill(children[0])

    async def _kill_both(self) -> None:
        if (worker := self._victim(with_child=True)) is None:
            return
        self._note("both", worker)
        children = worker.children
        worker.ended_by = "both"
        worker.kill()
        for child in children:
            _kill(child)

    async def _kill_server(self, name: str) -> None:
        if not self._world.base.locks[name].locked():
            self._note(name, self._victim())
            self._spawn(self._world.base.end_server(name, self._rng.uniform(0, 2)))
            await asyncio.sleep(0)

    async def _freeze(self) -> None:
        worker = self._victim()
        if worker is None or len(self._world.living) < 2 or any(one.frozen for one in self._world.living):
            return
        self._note("freeze", worker)
        job, _ = self._world.watch.phase_of(worker.name)
        worker.freeze()
        self._spawn(self._thaw_later(worker, job))

    async def _thaw_later(self, worker: Worker, job: str) -> None:
        """When another worker has taken its job over."""
        said = self._world.watch.progress.get(job)
        with suppress(TimeoutError):
            if said:
                await self._world.watch.attempt_beyond(job, said[-1].attempt or 0, TAKEN_OVER_SECONDS)
            else:
                await asyncio.sleep(self._world.base.size.session_seconds + 1)
        worker.thaw()

    async def _terminate(self) -> None:
        if (worker := self._victim()) is not None:
            self._note("term", worker)
            self._spawn(self._stop(worker))
            await asyncio.sleep(0)

    async def _stop(self, worker: Worker) -> None:
        worker.ended_by = "term"
        status = await self._world.stop(worker)
        if _was_trapped(worker, status):  # on its way out
            self._note_trap("worker", worker)
        elif status != 0:
            self.violations.append(f"{worker.name} ended with status {status} when it was told to stop: {worker.log}")

    async def _join(self) -> None:
        """One worker more than there are slots for, or the end of that one."""
        guest = len(self._slots) + 1
        there = [one for one in self._world.living if one.slot == guest]
        if there:
            await self._end_guest(there[0])
        else:
            former = [one for one in self._world.workers if one.slot == guest]
            if former:
                await self._see_off(former[-1])
            self.done.append(Deed(time.monotonic() - self._began, "join", f"w{guest}", "", ""))
            self._world.start_worker(guest)

    async def _end_guest(self, worker: Worker) -> None:
        if worker.ended_by is None and not worker.frozen and worker.ready:
            self._note("term", worker)
            self._spawn(self._stop(worker))
            await asyncio.sleep(0)

    async def _start(self, slot: int) -> None:
        """The next life of a slot, when the children of the last one are gone."""
        try:
            former = next((one for one in reversed(self._world.workers) if one.slot == slot), None)
            if former is not None:
                await self._see_off(former)
                await asyncio.sleep(self._rng.uniform(0, self._restart_seconds))
            trap = None if self._quiet or self._rng.random() > self._trapped else self._trap()
            self._world.start_worker(slot, trap, cold=self._rng.random() < self._cold)
        finally:
            self._starting.discard(slot)

    def _trap(self) -> points.Trap:
        moments = self._rng.choice((EARLY_TRAPS, UPLOAD_TRAPS, LATE_TRAPS, LATE_TRAPS, LATE_TRAPS))
        point, _, side = self._rng.choice(moments).partition(":")
        return self._world.trap(point, side, self._rng.choice(TRAP_VICTIMS))

    async def _see_off(self, worker: Worker) -> None:
        """A worker that has died: why, and what it has left running."""
        if worker.ended_by is None:
            status = worker.process.returncode
            if _was_trapped(worker, status):
                self._note_trap("worker", worker)
            else:
                self.violations.append(f"{worker.name} ended by itself with status {status}: {worker.log}")
        try:
            await until(lambda: not worker.children, CHILD_GONE_SECONDS, "its child is gone")
        except TimeoutError:
            pids = [child.pid for child in worker.children]
            self.violations.append(f"the children {pids} of {worker.name} outlive it: {worker.log}")


def _was_trapped(worker: Worker, status: int | None) -> bool:
    """Whether a worker that ended with this status was killed by its own trap."""
    trap = worker.trap
    return trap is not None and trap.victim == "worker" and trap.sprung and status == -signal.SIGKILL


def _kill(child: Child) -> None:
    with suppress(psutil.NoSuchProcess):
        psutil.Process(child.pid).kill()
