"""The command `mistudio-train`. Each module holds a group of commands; all come together here and nowhere else.

What is slow to load (Kafka's client, the store's, torch) is imported inside the commands that need it.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from mistudio_train import __version__
from mistudio_train.errors import JobError

from . import control, corpus, demo, estimate, fetch, look, machine, replay, reproduce, run, submit, watch, worker
from .display import say_error
from .environment import use_env_file
from .errors import CliError, Exit

app = typer.Typer(
    name="mistudio-train",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (
    submit.commands,
    watch.commands,
    control.commands,
    replay.commands,
    fetch.commands,
    look.commands,
    reproduce.commands,
    estimate.commands,
    corpus.commands,
    run.commands,
    worker.commands,
    machine.commands,
    demo.commands,
):
    app.add_typer(commands)


def show_version(wanted: bool) -> None:
    """Print it and be done, if it is wanted."""
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(epilog="Example: mistudio-train --env-file .stack/env submit request.yaml --wait")
def common(
    env_file: Annotated[
        Path | None, typer.Option(metavar="PATH", help="KEY=VALUE lines that win over the environment.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=show_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train sparse autoencoders on a transformer's activations, as jobs from Kafka or right here.

    Settings are environment variables (KAFKA_BOOTSTRAP_SERVERS, MINIO_ENDPOINT, DATA_PATH and others).
    Results go to stdout, everything else to stderr.
    """
    if env_file is not None:
        use_env_file(env_file)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its status; whatever ends it is told in one sentence.

    Args:
        arguments: of the command line; `None`: this process'.

    """
    # what a client library has to say is in the sentence; `serve` and `run` set up logging of their own
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        app(args=arguments, prog_name="mistudio-train")
    except CliError as error:
        say_error(str(error), error.hint)
        sys.exit(error.status)
    except JobError as error:
        say_error(str(error), error.hint)
        sys.exit(Exit.REFUSED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        say_error(f"{where}{error.strerror or error}", "Look at the path, its permissions and the disk's room.")
        sys.exit(Exit.REFUSED)
    sys.exit(Exit.COMPLETED)
