"""The command `run`: a request done here and now, on a laptop, under Slurm or on a rented GPU."""

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from mistudio_schemas import TrainCompleted, TrainFailed, TrainProgress, TrainRequested, new_job_id
from mistudio_train.settings import Settings

from .display import Bars, say, show_end
from .environment import load_settings
from .errors import CliError, Exit
from .local_model import folder_of_model, hub_token, starts_of, with_model_folder
from .request_input import assign, checked, read_request_file

if TYPE_CHECKING:
    from mistudio_train.worker.sinks.feeds import Sinks

commands = typer.Typer()


@commands.command(epilog="Example: mistudio-train run request.yaml --to results --set sae.k=32")
def run(
    request_file: Annotated[
        Path, typer.Argument(metavar="REQUEST", help="YAML or JSON file; corpus and model may be local paths.")
    ],
    to: Annotated[Path, typer.Option(metavar="DIR", help="The folder for the results; made if missing.")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Any field; may be repeated.")
    ] = None,
    corpus_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where a relative corpus_file is; here when left out.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over what is in the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line for each event.")] = False,
) -> None:
    """Train here, with no Kafka and no store: the same process and the same files as a worker's, in DIR.

    Exit status: 0 completed, 1 failed, 2 refused, 130 interrupted (nothing is left in DIR).
    """
    settings = load_settings()
    raw = assign(read_request_file(request_file), assignments or [])
    request = with_model_folder(checked(raw, settings.limits))
    corpus = _corpus(request.corpus_file, corpus_folder or Path())
    from mistudio_train.worker.sinks.feeds import Sinks

    sinks = Sinks(settings)
    event = _train(settings, request, corpus, _folder(to, force), sinks, as_json)
    if as_json:
        typer.echo(event.to_json())
    else:
        show_end(event)
        say(f"The files are in {to}." if isinstance(event, TrainCompleted) else "No file was written.")
    _leave(Exit.COMPLETED if isinstance(event, TrainCompleted) else Exit.FAILED, sinks)


def _train(
    settings: Settings, request: TrainRequested, corpus: Path | None, to: Path, sinks: "Sinks", as_json: bool
) -> TrainCompleted | TrainFailed:
    from .local import LocalJob, train_here

    job = LocalJob(
        request.job_id or new_job_id(),
        request,
        corpus,
        to,
        settings,
        tuple(folder_of_model(request)),
        starts_of(request),
        hub_token(request, settings),
    )
    try:
        with Bars() as bars:

            def listen(status: TrainProgress) -> None:
                if as_json:
                    typer.echo(status.to_json())
                bars.show(status)

            return asyncio.run(train_here(job, listen, sinks))
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("Interrupted; nothing was written.")
        _leave(Exit.INTERRUPTED, sinks)


def _leave(status: Exit, sinks: "Sinks") -> NoReturn:
    """End the process; at once where a sink hangs, as its library would have Python wait for it, W&B's for ever."""
    if sinks.hang:
        sys.stdout.flush()
        os._exit(status)
    raise typer.Exit(status)


def _corpus(name: str, folder: Path) -> Path | None:
    """The local file; `None`: a dataset of the hub."""
    from mistudio_train.worker.corpora import is_on_the_hub

    if is_on_the_hub(name):
        return None
    path = (folder / Path(name).expanduser()).resolve()
    if not path.is_file():
        raise CliError(f"there is no corpus {path}", "Name a local file in corpus_file, or its --corpus-folder.")
    return path


def _folder(to: Path, force: bool) -> Path:
    to.mkdir(parents=True, exist_ok=True)
    if not force and any(to.iterdir()):
        raise CliError(f"the folder {to} is not empty", "Name another, or write over it with --force.")
    return to.resolve()
