"""The commands `cancel` and `stop`: ask whichever worker has a job to end it. Does nothing to a job itself."""

import asyncio
import getpass
import socket
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mistudio_schemas import TrainControl, TrainProgress
from mistudio_train.settings import Settings
from mistudio_train.worker.outcome import ENDED

from .display import say
from .environment import load_settings
from .errors import CliError
from .request_input import checked_job_id
from .watch import watch_job

if TYPE_CHECKING:
    from .bus import StatusEvent

commands = typer.Typer()

Job = Annotated[str, typer.Argument(help="The job's id.")]
Run = Annotated[int | None, typer.Option(min=1, help="This run and no other; the one that is running when left out.")]
Reason = Annotated[str | None, typer.Option(help="Kept with the control.")]
By = Annotated[str | None, typer.Option(metavar="NAME", help="Who asks; the user and host when left out.")]
Force = Annotated[bool, typer.Option("--force", help="Send it though the job has ended: its next run will obey.")]
Wait = Annotated[bool, typer.Option("--wait", help="Then watch the job to its end.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print what was sent as an object.")]


@commands.command(epilog="Example: mistudio-train cancel train_20260802_210454_9f86d081 --reason 'wrong layer' --wait")
def cancel(
    job: Job,
    run: Run = None,
    reason: Reason = None,
    by: By = None,
    force: Force = False,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Throw a job away, running or still queued.

    Exit status: 0 asked for (with --wait: as of `watch`), 2 it has ended, or Kafka cannot be used.
    """
    _control("cancel", job, run, reason, by, force, wait, as_json)


@commands.command(epilog="Example: mistudio-train stop train_20260802_210454_9f86d081 --wait")
def stop(
    job: Job,
    run: Run = None,
    reason: Reason = None,
    by: By = None,
    force: Force = False,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """End a job's training now and keep the result.

    Exit status: 0 asked for (with --wait: as of `watch`), 2 it has ended, or Kafka cannot be used.
    """
    _control("stop", job, run, reason, by, force, wait, as_json)


def _control(
    action: Literal["cancel", "stop"],
    job: str,
    run: int | None,
    reason: str | None,
    by: str | None,
    force: bool,
    wait: bool,
    as_json: bool,
) -> None:
    from . import bus

    settings = load_settings()
    asked = TrainControl(
        job_id=checked_job_id(job), run=run, action=action, requested_by=by or _this_person(), reason=reason
    )
    with bus.reaching_kafka(settings):
        sent = asyncio.run(_send(settings, asked, force))
    if as_json and sent is not None:
        typer.echo(sent.to_json())
    if wait:
        watch_job(settings, asked.job_id, run=sent.run if sent else run, as_json=as_json)


async def _send(settings: Settings, asked: TrainControl, force: bool) -> TrainControl | None:
    """Publish it, aimed; `None`: there was no need to."""
    from . import bus

    latest = await bus.standing(settings, asked.job_id)
    if asked.run is None and not force:
        _require_unended(asked, latest)
        if _is_pending(latest):
            say(f"{asked.job_id} is being cancelled already; nothing was sent. To send it all the same: --force.")
            return None
    control = _aimed(asked, latest)
    await bus.tell(settings, control, _acknowledgement(control, latest))
    if latest is None:
        say(f"Nobody has heard of {control.job_id} yet; the control waits for it.")
    which = control.job_id if control.run is None else f"{control.job_id} run {control.run}"
    say(f"Asked the workers to {control.action} {which}.")
    return control


def _require_unended(asked: TrainControl, latest: "StatusEvent | None") -> None:
    """Raise CliError for a job whose last run is over: the control would wait for a run that nobody has thought of."""
    if latest is not None and latest.status in ENDED:
        run = "it" if latest.run is None else f"run {latest.run}"
        raise CliError(
            f"{asked.job_id} has ended: {run} is {latest.status}; nothing was sent",
            f"See how: `mistudio-train watch {asked.job_id}`. To {asked.action} its next run already now: --force.",
        )


def _is_pending(latest: "StatusEvent | None") -> bool:
    """Whether a control without a run waits for the job: a second one would only meet a later run."""
    return latest is not None and latest.status == "cancelling" and latest.run is None


def _aimed(asked: TrainControl, latest: "StatusEvent | None") -> TrainControl:
    """With the run that is meant, if a worker has begun one, so that it can never touch a later run."""
    if asked.run is not None or latest is None or latest.status in ENDED:
        return asked
    return asked.model_copy(update={"run": latest.run})


def _acknowledgement(control: TrainControl, latest: "StatusEvent | None") -> TrainProgress | None:
    """The status of a queued job that is to be cancelled; of a running one its worker speaks.

    It keeps the time of the status that it is about: should the job end at this moment, its end is the later one.
    """
    if not isinstance(latest, TrainProgress) or (control.action, latest.status) != ("cancel", "queued"):
        return None
    if control.run != latest.run:
        return None
    message = f"{control.requested_by} has asked to cancel it" + (f": {control.reason}" if control.reason else "")
    return latest.model_copy(update={"status": "cancelling", "message": message})


def _this_person() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user may have no name
        user = "somebody"
    return f"{user}@{socket.gethostname()}"
