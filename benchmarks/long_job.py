"""A job longer than any poll interval, on a worker that others join, leave and are killed beside all the time.

What is shown comes from the register and the topics: how often the job was begun, and the longest silence of its
progress. The same with a stock assignor shows what that costs. Changes nothing in the worker.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Final

from aiokafka import AIOKafkaProducer
from rich.console import Console
from rich.table import Table
from tests.worker.bus import Reader, events, reading

from benchmarks import sleeping
from benchmarks.job_queue import ROOT, Worker, as_settings, settings_for
from benchmarks.machine import machine
from mistudio_schemas import TrainCompleted, TrainProgress, TrainRequested, record_for
from mistudio_stack import open_stack
from mistudio_train.settings import Settings
from mistudio_train.worker import kafka
from mistudio_train.worker.register import Register
from mistudio_train.worker.store import open_store

RESULTS: Final = ROOT / "benchmarks" / "results" / "long_job.json"
SESSION_TIMEOUT_MS: Final = 6000
VISITORS: Final = 3
SHORT_SECONDS: Final = 1.0
SHORT_EVERY_SECONDS: Final = 4.0
STAY_SECONDS: Final = (4.0, 20.0)
AWAY_SECONDS: Final = (0.5, 4.0)
GAP_LIMIT: Final = 5.0


@dataclass(frozen=True)
class Measured:
    """A long job among workers that come and go."""

    assignor: str
    job_seconds: int
    """That it takes when nobody interferes."""
    took: float
    """From its first sign of life to its end."""
    attempts: int
    """How often it was begun."""
    workers: int
    """On how many workers."""
    gap: float
    """Seconds of the longest silence of its progress."""
    joined: int
    left: int
    killed: int
    rebalances: int
    """Of its first worker."""
    short: int
    """Short jobs, every one of which has ended once."""
    short_again: int
    """Attempts beyond the first of each: their workers left or were killed."""


class Visitors:
    """Workers that come, work a little, and leave in good order or are killed, in turns."""

    def __init__(self, env: dict[str, str], assignor: str) -> None:
        self._env, self._assignor = env, assignor
        self.ends: Counter[str] = Counter()
        self.joined = 0

    @asynccontextmanager
    async def about(self) -> AsyncIterator[None]:
        """While the block lasts they come and go."""
        tasks = [asyncio.create_task(self._come_and_go(number)) for number in range(VISITORS)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for failure in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(failure, Exception):
                    raise failure

    async def _come_and_go(self, number: int) -> None:
        for visit in count():
            await asyncio.sleep(random.uniform(*AWAY_SECONDS))
            # the stock assignor shares out by name: those before and those after the long job's worker
            name = f"{'ax'[visit % 2]}-visitor-{number}-{visit}"
            worker = Worker(self._env, name, self._assignor, SHORT_SECONDS, "speaks")
            try:
                await worker.until_ready()
                self.joined += 1
                await asyncio.sleep(random.uniform(*STAY_SECONDS))
                if (number + visit) % 2:
                    self.ends["killed"] += 1
                    worker.kill()
                else:
                    self.ends["left"] += 1
                    await asyncio.to_thread(worker.stop)
            finally:
                worker.kill()


class ShortJobs:
    """Requests of short jobs, one every few seconds, in every partition but the long job's."""

    def __init__(self, settings: Settings, producer: AIOKafkaProducer) -> None:
        self._settings, self._producer = settings, producer
        self.names: list[str] = []

    async def publish(self) -> None:
        """For ever."""
        while True:
            name = f"short-{len(self.names):04d}"
            partition = 1 + len(self.names) % (self._settings.kafka_request_partitions - 1)
            await self._producer.send_and_wait(**request(name, partition, self._settings))
            self.names.append(name)
            await asyncio.sleep(SHORT_EVERY_SECONDS)


def request(job_id: str, partition: int, settings: Settings) -> dict[str, Any]:
    """A record for aiokafka's `send`."""
    asked = TrainRequested(model_name="m", corpus_file="corpus.txt", job_id=job_id)
    return record_for(asked, source="/benchmark", topics=settings.topics).as_dict() | {"partition": partition}


async def measure(assignor: str, minutes: float, env: dict[str, str], console: Console) -> Measured:
    """Run the long job once; visitors stay away once it should have ended, so that it ends at all."""
    settings, seconds = as_settings(env), int(minutes * 60)
    env = env | {sleeping.LONG_SECONDS: str(seconds)}
    visitors, topics = Visitors(env, assignor), settings.topics
    await kafka.ensure_topics(settings)
    async with (
        reading(settings, topics.progress, topics.completed, topics.failed, topics.cancelled) as reader,
        kafka.started(kafka.producer(settings)) as producer,
    ):
        await producer.send_and_wait(**request(sleeping.LONG, 0, settings))
        home, short = Worker(env, "m-home", assignor, SHORT_SECONDS, "speaks"), ShortJobs(settings, producer)
        try:
            await home.until_ready()
            await reader.until(lambda found: any(b"going on" in record.value for record in found))
            began = time.monotonic()
            async with visitors.about():
                publishing = asyncio.create_task(short.publish())
                with contextlib.suppress(TimeoutError):
                    await reader.until(lambda found: is_over(found, topics.completed), seconds + 30)
                publishing.cancel()
            if not is_over(reader.records, topics.completed):
                console.print(f"{assignor}: it should have ended; the others leave it alone now")
                await reader.until(lambda found: is_over(found, topics.completed), 2 * seconds + 120)
            took = time.monotonic() - began
            ends = len(short.names) + 1
            await reader.until(lambda found: len([one for one in found if one.topic != topics.progress]) >= ends, 300)
            await reader.drained()
            rebalances = home.figure("mistudio_rebalances")
        finally:
            home.stop()
    return judged(assignor, seconds, took, reader, settings, visitors, short.names, rebalances)


def is_over(found: list[Any], completed: str) -> bool:
    """Whether the long job has ended."""
    return any(record.topic == completed and record.key == sleeping.LONG.encode() for record in found)


def judged(
    assignor: str,
    seconds: int,
    took: float,
    reader: Reader,
    settings: Settings,
    visitors: Visitors,
    names: list[str],
    rebalances: int,
) -> Measured:
    """What register and topics say."""
    terminal = [record for record in reader.records if record.topic != settings.topics.progress]
    ended = Counter(str(event.job_id) for event in events(terminal))  # type: ignore[attr-defined]
    if ended != Counter([sleeping.LONG, *names]):
        raise SystemExit(f"not every job has ended once: {ended - Counter([sleeping.LONG, *names])}")
    if not all(isinstance(event, TrainCompleted) for event in events(terminal)):
        raise SystemExit("a job has failed")
    register = Register(open_store(settings))
    (claim,) = register.runs(sleeping.LONG)
    said = [
        event
        for event in events([record for record in reader.records if record.topic == settings.topics.progress])
        if isinstance(event, TrainProgress) and event.job_id == sleeping.LONG
    ]
    times = sorted(event.time.timestamp() for event in said)
    again = sum(len(claim.record.attempts) - 1 for name in names for claim in register.runs(name))
    return Measured(
        assignor=assignor,
        job_seconds=seconds,
        took=round(took, 1),
        attempts=len(claim.record.attempts),
        workers=len({attempt.worker for attempt in claim.record.attempts}),
        gap=round(max(after - before for before, after in pairwise(times)), 2),
        joined=visitors.joined,
        left=visitors.ends["left"],
        killed=visitors.ends["killed"],
        rebalances=rebalances,
        short=len(names),
        short_again=again,
    )


def show(measured: list[Measured], console: Console) -> None:
    """The table that the documentation quotes."""
    names = ("job", "took", "attempts", "workers", "gap", "joined", "left", "killed", "rebalances", "short", "again")
    table = Table("assignor")
    for name in names:
        table.add_column(name, justify="right")
    for each in measured:
        figures = (each.attempts, each.workers, f"{each.gap:.1f} s", each.joined, each.left, each.killed)
        rest = (each.rebalances, each.short, each.short_again)
        table.add_row(each.assignor, f"{each.job_seconds} s", f"{each.took:.0f} s", *map(str, figures), *map(str, rest))
    console.print(table)
    console.print(
        f"Gap: the longest silence of the job's progress. Again: short jobs' attempts beyond their first. Session "
        f"timeout {SESSION_TIMEOUT_MS / 1000:.0f} s. {machine()}"
    )


def verdict(measured: list[Measured]) -> list[str]:
    """What is not as promised; nothing when all is well."""
    said = []
    for each in measured:
        if each.assignor == "ours" and each.attempts != 1:
            said.append(f"the job was begun {each.attempts} times.")
        if each.assignor == "ours" and each.gap > GAP_LIMIT:
            said.append(f"its progress was silent for {each.gap:.1f} s, and {GAP_LIMIT:.0f} s is the limit.")
    return said


async def measure_all(cases: list[tuple[str, float]], console: Console) -> list[Measured]:
    """Every case, one after the other."""
    measured = []
    with open_stack() as stack, tempfile.TemporaryDirectory(prefix="mistudio-long-") as folder:
        for assignor, minutes in cases:
            console.print(f"{assignor}: a job of {minutes:g} minutes …")
            name = f"long-{assignor}"
            env = settings_for(stack.env(), name, Path(folder)) | {
                "KAFKA_SESSION_TIMEOUT_MS": str(SESSION_TIMEOUT_MS),
                "KAFKA_REQUEST_PARTITIONS": "16",
                "GRACE_SECONDS": "5",
                "MAX_ATTEMPTS": "100",
            }
            measured.append(await measure(assignor, minutes, env, console))
    return measured


def main(arguments: list[str] | None = None) -> int:
    """Measure; 1 when something is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="that the job takes")
    parser.add_argument("--stock-minutes", type=float, default=2.0, help="the same with the stock assignor; 0: without")
    parser.add_argument("--to", type=Path, default=RESULTS, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    console = Console(width=126, highlight=False)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # new topics have no leader yet
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    cases = [
        (name, minutes) for name, minutes in (("ours", options.minutes), ("stock", options.stock_minutes)) if minutes
    ]
    measured = asyncio.run(measure_all(cases, console))
    show(measured, console)
    options.to.parent.mkdir(parents=True, exist_ok=True)
    figures = {"machine": machine(), "cases": [asdict(each) for each in measured]}
    options.to.write_text(json.dumps(figures, indent=2) + "\n")
    broken = verdict(measured)
    for line in broken:
        console.print(line)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
