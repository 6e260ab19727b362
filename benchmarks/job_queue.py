"""Measures how long several workers need for a queue of equal jobs, beside the shortest time there could be.

Workers are processes of their own on a real Kafka and a real MinIO, and each job is a child that sleeps: it is the
queue that is measured, not the work. Changes nothing in the worker.
"""

import argparse
import asyncio
import itertools
import json
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

from aiokafka import ConsumerRecord
from rich.console import Console
from rich.table import Table
from tests.worker.bus import events, reading

from benchmarks import sleeping
from benchmarks.machine import machine
from mistudio_schemas import TrainCompleted, TrainRequested, record_for
from mistudio_stack import open_stack
from mistudio_stack.process import free_ports
from mistudio_train.settings import Settings
from mistudio_train.worker import kafka

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results" / "job_queue.json"
JOBS: Final = 60
WORKERS: Final = 4
PARTITIONS: Final = 64
SECONDS: Final = 4.0
"""That a job sleeps. Its child's start costs about a second of CPU, and equal jobs of all workers start together."""
TIMEOUT: Final = 600.0


@dataclass(frozen=True)
class Case:
    """How requests reach partitions, and who shares them out."""

    name: str
    placement: Literal["hashed", "emptiest"]
    assignor: Literal["ours", "stock"]
    limit: float | None
    """The makespan may be so many times the perfect one."""


CASES: Final = (
    Case("hashed-ours", "hashed", "ours", 1.1),
    Case("emptiest-ours", "emptiest", "ours", 1.05),
    Case("hashed-stock", "hashed", "stock", None),
)


@dataclass(frozen=True)
class Measured:
    """A queue, from the first request's sending to the last job's end."""

    case: Case
    makespan: float
    one: float
    """Seconds that a job takes with its start and its end."""
    deepest: int
    """Requests in the fullest partition; they run one after the other."""
    by_worker: list[int]
    stopped: int
    """Attempts that were begun and not finished."""
    rebalances: int
    nudges: int

    @property
    def perfect(self) -> float:
        """The shortest time that there could be: as many jobs on every worker, without a pause."""
        return math.ceil(JOBS / WORKERS) * self.one

    @property
    def ratio(self) -> float:
        """To the perfect time."""
        return self.makespan / self.perfect


def settings_for(env: dict[str, str], name: str, folder: Path) -> dict[str, str]:
    """A worker's environment; topics, group, bucket and folder are the case's own."""
    samples = folder / name / "samples"
    samples.mkdir(parents=True)
    (samples / "corpus.txt").write_text("one\ntwo\nthree\n")
    return env | {
        "KAFKA_TOPIC_PREFIX": f"{name}.",
        "KAFKA_GROUP_ID": name,
        "KAFKA_REQUEST_PARTITIONS": str(PARTITIONS),
        "MINIO_BUCKET": f"bench-{name}",
        "DATA_PATH": str(folder / name),
        "API_HOST": "127.0.0.1",
        "MAX_CONCURRENT_JOBS": "1",
        "LOG_LEVEL": "WARNING",
    }


def as_settings(env: dict[str, str]) -> Settings:
    """The same as settings."""
    return Settings.model_validate({name.lower(): value for name, value in env.items()})


def requests(count: int, placement: str, settings: Settings) -> list[dict[str, Any]]:
    """Records for aiokafka's `send`."""
    made = []
    for number in range(count):
        asked = TrainRequested(model_name="m", corpus_file="corpus.txt", job_id=f"job-{number:03d}")
        record = record_for(asked, source="/benchmark", topics=settings.topics).as_dict()
        made.append(record if placement == "hashed" else record | {"partition": number % PARTITIONS})
    return made


class Worker:
    """A worker's process and its HTTP port."""

    def __init__(self, env: dict[str, str], name: str, assignor: str, seconds: float, job: str = "sleeps") -> None:
        self._port: int
        (self._port,) = free_ports(1)
        own = {"WORKER_ID": name, "API_PORT": str(self._port), sleeping.SECONDS: str(seconds)}
        path = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        # from "-c", for children import their parent's main module again, and there is none
        command = [sys.executable, "-c", f"from benchmarks.sleeping import serve; serve({assignor!r}, {job!r})"]
        self._process = subprocess.Popen(command, cwd=ROOT, env=os.environ | env | own | path)

    def page(self, path: str) -> str:
        """What the worker says there; nothing while it is not up."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=10) as answer:
                return str(answer.read(), "utf-8")
        except (urllib.error.URLError, ConnectionError):
            return ""

    def figure(self, metric: str) -> int:
        """One of its counters."""
        found = [line for line in self.page("/metrics").splitlines() if line.startswith(f"{metric}_total ")]
        return int(float(found[0].split()[1]))

    async def until_ready(self) -> None:
        """Until it is a member of the group, with partitions."""
        while not await asyncio.to_thread(self.page, "/ready"):
            if self._process.poll() is not None:
                raise SystemExit("a worker has ended before it was ready")
            await asyncio.sleep(0.1)

    def stop(self) -> None:
        """Tell it to stop, and wait until it has."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)

    def kill(self) -> None:
        """`kill -9`; its children see that and end by themselves."""
        self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid


@asynccontextmanager
async def workers(count: int, env: dict[str, str], assignor: str, seconds: float) -> AsyncIterator[list[Worker]]:
    """Workers that have joined their group; stopped at the end."""
    started = [Worker(env, f"worker-{number}", assignor, seconds) for number in range(count)]
    try:
        for worker in started:
            await worker.until_ready()
        yield started
    finally:
        for worker in started:
            await asyncio.to_thread(worker.stop)


@dataclass(frozen=True)
class End:
    """Of a job."""

    seconds: float
    """Since the first request was sent."""
    event: TrainCompleted


async def run(settings: Settings, wanted: list[dict[str, Any]]) -> list[End]:
    """Send the requests and wait for their ends."""
    ends: list[End] = []

    def another(found: list[ConsumerRecord]) -> bool:
        return len(found) > len(ends)

    topic = settings.topics.completed
    async with kafka.started(kafka.producer(settings)) as producer, reading(settings, topic) as reader:
        began = time.monotonic()
        sent = [await producer.send(**record) for record in wanted]
        await asyncio.gather(*sent)
        while len(ends) < len(wanted):
            await reader.until(another, TIMEOUT)
            ends += _ends(reader.records[len(ends) :], time.monotonic() - began)
        return ends + _ends((await reader.drained())[len(ends) :], math.inf)


def _ends(records: list[ConsumerRecord], seconds: float) -> list[End]:
    return [End(seconds, cast(TrainCompleted, event)) for event in events(records)]


def time_of_one(ends: list[End]) -> float:
    """From one job's end to the next one's on the same worker, start of the child included: the median.

    Taken in the case itself, for the machine is then as busy as it is. The few waits that the median passes over are
    what the makespan is longer by.
    """
    by_worker: dict[str, list[float]] = {}
    for end in ends:
        by_worker.setdefault(str(end.event.worker), []).append(end.seconds)
    return statistics.median(after - before for own in by_worker.values() for before, after in itertools.pairwise(own))


async def measure(case: Case, env: dict[str, str], seconds: float) -> Measured:
    """Run the case."""
    settings = as_settings(env)
    async with workers(WORKERS, env, case.assignor, seconds) as group:
        before = max(worker.figure("mistudio_rebalances") for worker in group)
        ends = await run(settings, requests(JOBS, case.placement, settings))
        after = max(worker.figure("mistudio_rebalances") for worker in group)
        nudges = sum(worker.figure("mistudio_nudges") for worker in group)
    if Counter(end.event.job_id for end in ends) != Counter(f"job-{number:03d}" for number in range(JOBS)):
        raise SystemExit(f"{case.name}: not every job has ended once")
    return Measured(
        case,
        makespan=ends[-1].seconds,
        one=time_of_one(ends),
        deepest=max(Counter(await placed(settings)).values()),
        by_worker=sorted(Counter(str(end.event.worker) for end in ends).values()),
        stopped=sum((end.event.attempt or 1) - 1 for end in ends),
        rebalances=after - before,
        nudges=nudges,
    )


async def placed(settings: Settings) -> list[int]:
    """The partition of every request."""
    async with reading(settings, settings.topics.requested) as reader:
        return [record.partition for record in await reader.drained()]


def report(measured: list[Measured], seconds: float) -> dict[str, Any]:
    """The figures as plain data."""
    return {
        "machine": machine(),
        "jobs": JOBS,
        "workers": WORKERS,
        "partitions": PARTITIONS,
        "job_sleeps_seconds": seconds,
        "cases": [
            {
                "name": case.case.name,
                "placement": case.case.placement,
                "assignor": case.case.assignor,
                "limit": case.case.limit,
                "job_takes_seconds": round(case.one, 3),
                "makespan_seconds": round(case.makespan, 2),
                "perfect_seconds": round(case.perfect, 2),
                "ratio": round(case.ratio, 3),
                "deepest_partition": case.deepest,
                "jobs_by_worker": case.by_worker,
                "jobs_stopped": case.stopped,
                "rebalances": case.rebalances,
                "nudges": case.nudges,
            }
            for case in measured
        ],
    }


def show(measured: list[Measured], seconds: float, console: Console) -> None:
    """The table that the documentation quotes."""
    table = Table("placement", "assignor", "one job", "makespan", "perfect", "ratio", "by worker", "deepest")
    for name in ("stopped", "rebalances", "nudges"):
        table.add_column(name)
    for column in table.columns[2:]:
        column.justify = "right"
    for each in measured:
        table.add_row(
            each.case.placement,
            each.case.assignor,
            f"{each.one:.2f} s",
            f"{each.makespan:.1f} s",
            f"{each.perfect:.1f} s",
            f"{each.ratio:.3f}",
            "/".join(map(str, each.by_worker)),
            *map(str, (each.deepest, each.stopped, each.rebalances, each.nudges)),
        )
    console.print(table)
    console.print(
        f"{JOBS} jobs on {WORKERS} workers and {PARTITIONS} partitions; a job sleeps {seconds:.1f} s, the rest of its "
        f"time are its start and its end. Deepest: requests in the fullest partition. {machine()}"
    )


def verdict(measured: list[Measured]) -> list[str]:
    """What is not as promised; nothing when all is well."""
    said = []
    for each in measured:
        limit = each.case.limit
        if limit and each.ratio > limit:
            said.append(f"{each.case.name}: {each.ratio:.3f} times the perfect makespan, and {limit} is the limit.")
        if each.case.assignor == "ours" and each.stopped:
            said.append(f"{each.case.name}: {each.stopped} jobs were stopped.")
    return said


async def measure_all(names: list[str], seconds: float, console: Console) -> list[Measured]:
    """Every case, one after the other."""
    measured = []
    with open_stack() as stack, tempfile.TemporaryDirectory(prefix="mistudio-queue-") as folder:
        for case in CASES:
            if not names or case.name in names:
                console.print(f"{case.name} …")
                env = settings_for(stack.env(), case.name, Path(folder))
                measured.append(await measure(case, env, seconds))
    return measured


def main(arguments: list[str] | None = None) -> int:
    """Measure all cases; 1 when one is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that a job sleeps")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="only this one")
    parser.add_argument("--to", type=Path, default=RESULTS, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    console = Console(width=126, highlight=False)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # new topics have no leader yet
    measured = asyncio.run(measure_all(options.case or [], options.seconds, console))
    show(measured, options.seconds, console)
    options.to.parent.mkdir(parents=True, exist_ok=True)
    options.to.write_text(json.dumps(report(measured, options.seconds), indent=2) + "\n")
    broken = verdict(measured)
    for line in broken:
        console.print(line)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
