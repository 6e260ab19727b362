"""The commands `watch` and `jobs`: how jobs stand, from the topics alone."""

import asyncio
from contextlib import aclosing
from typing import Annotated

import typer
from rich.table import Table

from mistudio_schemas import TrainCancelled, TrainCompleted, TrainFailed, TrainProgress
from mistudio_train.settings import Settings

from .display import Bars, number, results, say, show_end
from .environment import load_settings
from .errors import CliError, Exit

commands = typer.Typer()
EXIT_OF = {TrainCompleted: Exit.COMPLETED, TrainFailed: Exit.FAILED, TrainCancelled: Exit.CANCELLED}


@commands.command(epilog="Example: mistudio-train watch train_20260802_210454_9f86d081 --json")
def watch(
    job: Annotated[str, typer.Argument(help="The job's id.")],
    run: Annotated[int | None, typer.Option(min=1, help="This run only; the newest when left out.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds after which to stop watching.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line for each event.")] = False,
) -> None:
    """Show a job live until it ends.

    Exit status: 0 completed, 1 failed, 3 cancelled, 4 not ended within --timeout, 2 Kafka cannot be used.
    """
    watch_job(load_settings(), job, run=run, timeout=timeout, as_json=as_json)


def watch_job(
    settings: Settings, job_id: str, *, run: int | None = None, timeout: float | None = None, as_json: bool = False
) -> None:
    """Show the job until it ends, and exit with the status that tells how.

    Raises:
        typer.Exit: always.
        CliError: if Kafka cannot be used, or the time is over.

    """
    from . import bus

    with bus.reaching_kafka(settings):
        try:
            status = asyncio.run(_watch(settings, job_id, run, timeout, as_json))
        except KeyboardInterrupt:
            say(f"{job_id} goes on without being watched.")
            status = Exit.INTERRUPTED
    raise typer.Exit(status)


async def _watch(settings: Settings, job_id: str, run: int | None, seconds: float | None, as_json: bool) -> Exit:
    from . import bus

    end: bus.Terminal | None = None
    try:
        with Bars() as bars:
            async with asyncio.timeout(seconds) as limit, aclosing(bus.follow(settings, job_id, run)) as events:
                async for event in events:
                    if event is None:
                        say(f"Nobody has heard of {job_id}{f' run {run}' if run else ''} yet; waiting for it.")
                        continue
                    if as_json:
                        typer.echo(event.to_json())
                    if isinstance(event, TrainProgress):
                        bars.show(event)
                    else:
                        end = event
    except TimeoutError:
        if limit.expired():
            raise CliError(f"{job_id} has not ended in time", "It goes on; watch it again.", Exit.TIMED_OUT) from None
        raise
    assert end is not None  # the events end with it
    if not as_json:
        show_end(end)
    return EXIT_OF[type(end)]


@commands.command(epilog="Example: mistudio-train jobs --json")
def jobs(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of statuses.")] = False) -> None:
    """List the latest status of every job.

    Exit status: 0, or 2 when Kafka cannot be used.
    """
    settings = load_settings()
    from . import bus

    with bus.reaching_kafka(settings):
        statuses = asyncio.run(bus.latest_statuses(settings))
    if as_json:
        results().print_json(data=[status.model_dump(mode="json") for status in statuses])
    elif statuses:
        results().print(_table(statuses))
    else:
        say(f"No job has said anything on {settings.topics.progress}.")


def _table(statuses: list[TrainProgress]) -> Table:
    table = Table("job", "run", "status", "phase", "done", "loss", "said at (UTC)", "message", box=None)
    for status in statuses:
        table.add_row(
            status.job_id,
            "-" if status.run is None else str(status.run),
            status.status,
            status.phase,
            f"{status.progress:.0%}",
            number(status.current_loss),
            f"{status.time:%Y-%m-%d %H:%M:%S}",
            status.message,
        )
    return table
