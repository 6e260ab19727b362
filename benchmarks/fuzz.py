"""Hostile messages by the thousand through a worker's real consumer: each ends once, and memory stays as it is.

A message is a dead letter byte for byte, or its job has one terminal event; at the end an ordinary job is done. The
worker is a process of its own on a real Kafka and a real MinIO. Changes nothing in the worker.
"""

import argparse
import asyncio
import json
import logging
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import psutil
from aiokafka import ConsumerRecord
from rich.console import Console
from rich.table import Table
from tests.worker import hostile
from tests.worker.bus import events, reading
from tests.worker.bus import publish as publish_records

from benchmarks.job_queue import ROOT, Worker, as_settings, settings_for
from benchmarks.long_job import request
from benchmarks.machine import machine
from mistudio_schemas import TrainCompleted
from mistudio_stack import open_stack

RESULTS: Final = ROOT / "benchmarks" / "results" / "fuzz.json"
SLOTS: Final = 4
PARTITIONS: Final = 16
LARGE: Final = 20
"""Messages of 9 MB."""
MIB: Final = 1024**2
STEPS: Final = (0.1, 0.5, 1.0)
WINDOW: Final = 0.05
"""Of all messages: the last so many before a step, of whose memory the median is taken. One message of 9 MB, several
times in memory for a moment, is a tenth of a worker's."""
RATIO_LIMIT: Final = 1.25
"""Of the memory at the end to that after a tenth."""


@dataclass(frozen=True)
class Measured:
    """Messages, and what became of them."""

    messages: int
    seconds: float
    letters: int
    jobs: int
    codes: dict[str, int]
    rss_mib: list[float]
    """Of the worker at 10%, 50% and all of the messages, each a median."""
    most_mib: float
    """At any time."""
    wrong: list[str]

    @property
    def rate(self) -> float:
        """Messages a second."""
        return self.messages / self.seconds

    @property
    def ratio(self) -> float:
        """Memory at the end to that after a tenth."""
        return self.rss_mib[-1] / self.rss_mib[0]


async def measure(count: int, number: int, env: dict[str, str], folder: Path) -> Measured:
    """Send them, and account for each."""
    settings = as_settings(env)
    topics, samples = settings.topics, settings.data_path / "samples"
    before = hostile.lay_canaries(folder, samples)
    await publish_records(settings)
    source = hostile.Hostility(number, settings, folder / "canary.txt")
    messages = source.messages(count, large_every=max(100, count // LARGE))
    sent = await hostile.send(messages, settings)
    worker = Worker(env, "worker", "ours", 0)
    rss: list[float] = []
    ends = topics.dead_letter, topics.completed, topics.failed, topics.cancelled
    try:
        async with reading(settings, *ends) as reader:
            await worker.until_ready()
            process, began = psutil.Process(worker.pid), time.monotonic()

            def all_ended(found: list[ConsumerRecord]) -> bool:
                rss.append(process.memory_info().rss / MIB)  # one for each end that is heard
                return len(found) >= count

            await reader.until(all_ended, 6 * 3600)
            seconds = time.monotonic() - began
            account = hostile.accounted(sent, await reader.drained(), settings)
            await publish_records(settings, request("the-last", 0, settings))
            last = events(await reader.of(topics.completed, account.codes["completed"] + 1))[-1]
            if not isinstance(last, TrainCompleted) or last.job_id != "the-last":
                account.wrong.append("the worker does no ordinary job any more")
    finally:
        worker.stop()
    if hostile.outside(folder) != before:
        account.wrong.append("a file outside the worker's folder is another one now")
    figures = len(account.letters), len(account.jobs), dict(account.codes.most_common())
    at_steps = [round(statistics.median(rss[int((share - WINDOW) * count) : int(share * count)]), 1) for share in STEPS]
    return Measured(count, round(seconds, 1), *figures, at_steps, round(max(rss), 1), account.wrong)


def show(measured: Measured, console: Console) -> None:
    """The table that the documentation quotes."""
    steps = "RSS 10%", "50%", "100%", "most", "ratio"
    table = Table("messages", "seconds", "a second", "dead letters", "jobs", *steps, "wrong")
    rss = [f"{mib:.0f} MiB" for mib in (*measured.rss_mib, measured.most_mib)]
    table.add_row(
        f"{measured.messages:,}",
        f"{measured.seconds:.0f}",
        f"{measured.rate:.1f}",
        f"{measured.letters:,}",
        f"{measured.jobs:,}",
        *rss,
        f"{measured.ratio:.3f}",
        str(len(measured.wrong)),
    )
    console.print(table)
    ends = ", ".join(f"{code} {count:,}" for code, count in measured.codes.items())
    console.print(f"Jobs: {ends}. {SLOTS} slots, {PARTITIONS} partitions. {machine()}")


def main(arguments: list[str] | None = None) -> int:
    """Send and account; 1 when a message is not accounted for, or memory has grown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=2000, help="that are sent")
    parser.add_argument("--seed", type=int, default=1, help="another one sends other messages")
    parser.add_argument("--to", type=Path, default=RESULTS, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    console = Console(width=126, highlight=False)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # new topics have no leader yet
    with open_stack() as stack, tempfile.TemporaryDirectory(prefix="mistudio-fuzz-") as folder:
        env = settings_for(stack.env(), "data", Path(folder)) | {
            "KAFKA_REQUEST_PARTITIONS": str(PARTITIONS),
            "MAX_CONCURRENT_JOBS": str(SLOTS),
            "LOG_LEVEL": "ERROR",
        }
        measured = asyncio.run(measure(options.messages, options.seed, env, Path(folder)))
    show(measured, console)
    figures = asdict(measured) | {"machine": machine(), "a_second": round(measured.rate, 1)}
    options.to.parent.mkdir(parents=True, exist_ok=True)
    options.to.write_text(json.dumps(figures | {"wrong": measured.wrong[:50]}, indent=2) + "\n")
    for line in measured.wrong[:20]:
        console.print(line)
    if grown := measured.ratio > RATIO_LIMIT:
        console.print(f"memory has grown {measured.ratio:.2f} times, and {RATIO_LIMIT} is the limit.")
    return 1 if measured.wrong or grown else 0


if __name__ == "__main__":
    sys.exit(main())
