"""A store or a broker away for a minute at each moment of a job: what was waited, and that the job still ended once.

Servers are killed and started again, or frozen, so that connections stay open and nothing is answered. Each job must
end in one terminal event, all its artifacts as their sha256 says. Changes nothing in the worker.
"""

import argparse
import asyncio
import json
import logging
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from rich.console import Console
from rich.table import Table
from tests.worker.outages import BROKER_MOMENTS, STORE_MOMENTS, Moment, away, job_through, lay_corpus

from benchmarks.job_queue import ROOT, as_settings, settings_for
from benchmarks.machine import machine
from mistudio_stack import NativeStack, native_stack

RESULTS: Final = ROOT / "benchmarks" / "results" / "outages.json"
How = Literal["killed", "paused"]
WORDS: Final[dict[Moment, str]] = {
    "corpus": "the corpus is fetched",
    "checkpoint": "a checkpoint goes up",
    "upload": "the artifacts go up",
    "swap": "the register is swapped",
    "beginning": "the job begins",
    "terminal": "before the last transaction",
    "transaction": "in the last transaction",
}


@dataclass(frozen=True)
class Measured:
    """A job that met an outage."""

    server: str
    moment: Moment
    how: How
    away: float
    ended: float | None
    """Seconds from the outage's beginning to the job's end; `None`: it has not ended as it must."""
    attempts: int
    wrong: str = ""


async def measure(stack: NativeStack, moment: Moment, how: How, seconds: float, folder: Path) -> Measured:
    """One job, one outage."""
    name = f"{moment}-{how}"
    settings = as_settings(settings_for(stack.env(), name, folder))
    server = stack.minio if moment in STORE_MOMENTS else stack.kafka
    lay_corpus(settings, folder)
    try:
        waited = await job_through(moment, away(server, how, seconds), settings, 3 * seconds + 300)
    except (AssertionError, TimeoutError) as error:
        return Measured(server.name, moment, how, seconds, None, 0, f"{type(error).__name__}: {error}")
    return Measured(server.name, moment, how, seconds, round(waited.seconds, 1), waited.done.attempt or 1)


def show(measured: list[Measured], console: Console) -> None:
    """The table that the documentation quotes."""
    table = Table(
        "server", "how", "when", "away", "job ended after", "waited beyond", "attempts", "one end, files exact"
    )
    for each in measured:
        ended = "-" if each.ended is None else f"{each.ended:.0f} s"
        beyond = "-" if each.ended is None else f"{each.ended - each.away:.0f} s"
        right = each.wrong or "yes"
        when = WORDS[each.moment]
        table.add_row(each.server, each.how, when, f"{each.away:.0f} s", ended, beyond, str(each.attempts), right)
    console.print(table)
    console.print(f"After: from the outage's beginning; the job itself takes some seconds more. {machine()}")


async def measure_all(seconds: float, moments: list[Moment], console: Console, to: Path) -> list[Measured]:
    """Every moment, each server killed and paused; the figures so far are in the file after each."""
    measured: list[Measured] = []
    hows: tuple[How, ...] = ("killed", "paused")
    with native_stack() as stack, tempfile.TemporaryDirectory(prefix="mistudio-outages-") as folder:
        for moment in moments:
            for how in hows:
                console.print(f"{moment}, {how} …")
                measured.append(await measure(stack, moment, how, seconds, Path(folder)))
                keep(measured, to)
    return measured


def keep(measured: list[Measured], to: Path) -> None:
    """Write the figures."""
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps({"machine": machine(), "cases": [asdict(each) for each in measured]}, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Measure; 1 when a job has not ended as it must."""
    every: list[Any] = [*STORE_MOMENTS, *BROKER_MOMENTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="that a server is away")
    parser.add_argument("--moment", action="append", choices=every, help="only this one")
    parser.add_argument("--to", type=Path, default=RESULTS, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    console = Console(width=126, highlight=False)
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)
    measured = asyncio.run(measure_all(options.seconds, options.moment or every, console, options.to))
    show(measured, console)
    return 1 if any(each.wrong for each in measured) else 0


if __name__ == "__main__":
    sys.exit(main())
