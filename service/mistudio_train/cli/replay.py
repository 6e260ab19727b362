"""The command `replay`: run old requests again, by publishing them again or by setting the workers' group back.

Shows first what it will do, and asks.
"""

import asyncio
import json
import re
import sys
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from mistudio_train.errors import brief
from mistudio_train.settings import Settings

from .display import notes, results, say
from .environment import load_settings
from .errors import CliError, Exit
from .request_input import checked_job_id

if TYPE_CHECKING:
    from .bus import Story
    from .group import Move
    from .requests_log import Chosen, Selection

commands = typer.Typer()
CELL_CHARACTERS = 120
LAST_MILLISECOND = 253_402_300_799_999
"""Of the year 9999: a sender may write any time into its message."""


@dataclass
class Plan:
    """What is to be done. Without moves of the group, the requests are published again."""

    chosen: "list[Chosen]"
    stories: "Mapping[str, Story]"
    moves: "list[Move]" = field(default_factory=list)

    @property
    def requests(self) -> "list[Chosen]":
        """Those of the messages that can be run again."""
        return [one for one in self.chosen if not one.why_not]


@commands.command(epilog="Example: mistudio-train replay --from-time 2026-08-01T00:00:00Z --dry-run")
def replay(
    job: Annotated[
        list[str] | None, typer.Option("--job", metavar="ID", help="The newest request of this job; may be repeated.")
    ] = None,
    from_time: Annotated[
        str | None, typer.Option(metavar="TIME", help="All since: ISO 8601 (UTC) or milliseconds since 1970.")
    ] = None,
    from_offset: Annotated[
        list[str] | None, typer.Option(metavar="P:OFFSET", help="All of partition P from there; may be repeated.")
    ] = None,
    to_time: Annotated[str | None, typer.Option(metavar="TIME", help="None that is later.")] = None,
    to_offset: Annotated[
        list[str] | None, typer.Option(metavar="P:OFFSET", help="None of partition P behind it; may be repeated.")
    ] = None,
    reset_group: Annotated[
        bool, typer.Option("--reset-group", help="Set the workers' group back to there instead; no worker may run.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object instead of tables.")] = False,
) -> None:
    """Run old requests again: each is published once more, and is a new run of its job.

    With --reset-group the workers' group begins again at the first of them instead, and runs everything behind it.

    Exit status: 0 done or shown, 2 nothing to do, not confirmed, or not possible.
    """
    selection = _selection(job, from_time, from_offset, to_time, to_offset, reset_group)
    settings = load_settings()
    from . import bus

    with bus.reaching_kafka(settings):
        plan = asyncio.run(_plan(settings, selection, reset_group))
    if not as_json:
        _show(plan)
    elif not (dry_run or yes):
        _show(plan, for_question=True)
    _require_work(plan, reset_group)
    done: list[str] = []
    if not dry_run:
        _confirm(plan, settings, yes)
        with bus.reaching_kafka(settings):
            done = asyncio.run(_carry_out(settings, plan))
    if as_json:
        typer.echo(json.dumps(_as_json(plan, done, changed=not dry_run)))


async def _plan(settings: Settings, selection: "Selection", reset_group: bool) -> Plan:
    from . import bus, group, requests_log

    found = await requests_log.find(settings, selection)
    moves = []
    if reset_group:
        moves = await group.moves_back(settings, found.places, found.begins)
        places = {move.partition: move.new for move in moves}
        behind = requests_log.Selection(offsets=places)
        found = await requests_log.find(settings, behind) if places else requests_log.Found([], found.begins)
    stories = await bus.stories(settings, {one.job_id for one in found.chosen if one.job_id is not None})
    return Plan(found.chosen, stories, moves)


async def _carry_out(settings: Settings, plan: Plan) -> list[str]:
    """Do it; the places where requests were published."""
    from . import group, requests_log

    if plan.moves:
        await group.reset(settings, plan.moves)
        say(f"The group {settings.kafka_group_id} is at the new offsets; they read back so.")
        return []
    places: list[str] = []
    async with aclosing(requests_log.publish_again(settings, plan.requests)) as published:
        # each as it goes out: of those before a broker's death nobody has to guess
        async for place in published:
            say(f"{plan.requests[len(places)].job_id} is published again: {place}.")
            places.append(place)
    return places


def _require_work(plan: Plan, reset_group: bool) -> None:
    if plan.moves or (plan.requests and not reset_group):
        return
    if reset_group:
        raise CliError(
            "there is nothing to set back: the group has not passed these places, or they are not there",
            "What the group has not passed yet it will run anyway. Look without --reset-group at what is there.",
        )
    raise CliError(
        "there is no such request to run again", "Look at the topic with an earlier --from-time and --dry-run."
    )


def _confirm(plan: Plan, settings: Settings, yes: bool) -> None:
    """Go on if that is wanted.

    Raises:
        CliError: if nobody can be asked.
        typer.Exit: if the answer is no.

    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise CliError(
            "nothing was changed: there is no terminal to ask at", "Look with --dry-run, then repeat it with --yes."
        )
    count = len(plan.requests)
    question = f"Publish {count} request{'s' if count > 1 else ''} again?"
    if plan.moves:
        question = f"Set {len(plan.moves)} partitions of {settings.kafka_group_id} back, and run all of these?"
    try:
        wanted = typer.confirm(question, err=True)
    except typer.Abort:
        wanted = False
    if not wanted:
        say("Nothing was changed.")
        raise typer.Exit(Exit.REFUSED)


def _selection(
    jobs: list[str] | None,
    from_time: str | None,
    from_offset: list[str] | None,
    to_time: str | None,
    to_offset: list[str] | None,
    reset_group: bool,
) -> "Selection":
    from .requests_log import Selection

    if sum(bool(given) for given in (jobs, from_time, from_offset)) != 1:
        raise CliError("which requests?", "Give one of --job, --from-time and --from-offset.")
    if (to_time or to_offset) and (jobs or reset_group):
        raise CliError(
            "--to-time and --to-offset end a range that is published again",
            "A job has one newest request; a group that is set back runs everything behind.",
        )
    return Selection(
        tuple(checked_job_id(job) for job in jobs or []),
        _milliseconds(from_time) if from_time else None,
        _offsets(from_offset),
        _milliseconds(to_time) if to_time else None,
        _offsets(to_offset),
    )


def _milliseconds(text: str) -> int:
    """Of a time, since the epoch."""
    if re.fullmatch(r"[0-9]{1,18}", text):
        return int(text)
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        hint = "Write 2026-08-01T12:00:00Z, or milliseconds since 1970."
        raise CliError(f"'{text}' is no time", hint) from None
    return max(0, int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000))


def _offsets(texts: list[str] | None) -> dict[int, int]:
    """Partition to offset."""
    found = {}
    for text in texts or []:
        place = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,18})", text)
        if place is None:
            raise CliError(f"'{text}' is no place", "Write PARTITION:OFFSET, such as 3:17.")
        found[int(place[1])] = int(place[2])
    return found


def _show(plan: Plan, *, for_question: bool = False) -> None:
    console = notes() if for_question else results()
    if plan.moves:
        table = Table("partition", "committed offset", "new offset", box=None)
        for move in plan.moves:
            table.add_row(str(move.partition), "none" if move.old is None else str(move.old), str(move.new))
        console.print(table)
    if plan.chosen:
        table = Table("partition", "offset", "written at (UTC)", "job", "model", "corpus", "the job now", box=None)
        for one in plan.chosen:
            message = one.message
            written = f"{_written(one):%Y-%m-%d %H:%M:%S}"
            table.add_row(str(message.partition), str(message.offset), written, *_cells(one, plan.stories))
        console.print(table)


def _cells(one: "Chosen", stories: "Mapping[str, Story]") -> list[str]:
    request = one.intake.request if one.intake is not None else None
    known = [one.job_id or "-", request.model_name if request else "-", request.corpus_file if request else "-"]
    return [escape(_plain(cell)) for cell in (*known, one.why_not or _standing(stories[str(one.job_id)]))]


def _standing(story: "Story") -> str:
    latest = story.end or story.progress
    if latest is None:
        return "not heard of"
    return latest.status if latest.run is None else f"{latest.status}, run {latest.run}"


def _plain(text: str) -> str:
    """Of foreign bytes, what a terminal may be given."""
    return brief("".join(sign if sign.isprintable() else "�" for sign in text), CELL_CHARACTERS)


def _written(one: "Chosen") -> datetime:
    return datetime.fromtimestamp(min(max(0, one.message.timestamp), LAST_MILLISECOND) / 1000, UTC)


def _as_json(plan: Plan, places: list[str], *, changed: bool) -> dict[str, Any]:
    published = {one.message.place: place for one, place in zip(plan.requests, places, strict=bool(places))}
    return {
        "messages": [
            {
                "partition": one.message.partition,
                "offset": one.message.offset,
                "time": _written(one).isoformat(),
                "job_id": one.job_id,
                "ended": one.job_id is not None and plan.stories[one.job_id].end is not None,
                "why_not": one.why_not or None,
                "published": published.get(one.message.place),
            }
            for one in plan.chosen
        ],
        "offsets": [{"partition": move.partition, "old": move.old, "new": move.new} for move in plan.moves],
        "changed": changed,
    }
