"""The commands `corpus put|list|rm`: texts in the store, for requests to name. What a name may be, the worker says."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .display import results, say
from .environment import load_settings

if TYPE_CHECKING:
    from mistudio_train.worker.store import Store

commands = typer.Typer()
corpus = typer.Typer(name="corpus", no_args_is_help=True)
commands.add_typer(corpus)


@corpus.callback(epilog="Example: mistudio-train corpus put stories.txt")
def about() -> None:
    """Put, list and remove the texts that requests name.

    Exit status: 0, or 2 when it could not be done.
    """


@corpus.command(epilog="Example: mistudio-train corpus put ~/texts/stories.jsonl.gz --name stories.jsonl.gz")
def put(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=".txt, .csv, .json, .jsonl or .parquet, also .gz.")],
    name: Annotated[str | None, typer.Option(help="What requests call it; the file's name when left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object instead of the bare name.")] = False,
) -> None:
    """Put a file into the store, in place of one of the same name. Prints the name for `corpus_file`.

    Exit status: 0 stored, 2 refused, or the store cannot be used.
    """
    from mistudio_train.worker.corpora import checked_name, put_corpus

    checked = checked_name(name or file.name)
    with _store() as store:
        store.ensure()
        stored = put_corpus(store, checked, file)
    typer.echo(json.dumps({"name": checked, "size": stored.size}) if as_json else checked)


@corpus.command("list", epilog="Example: mistudio-train corpus list --json")
def list_all(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """List the texts in the store.

    Exit status: 0, or 2 when the store cannot be used.
    """
    from mistudio_train.worker.corpora import list_corpora

    with _store() as store:
        found = list_corpora(store)
    if as_json:
        listed = [{"name": name, "size": one.size, "modified": one.modified.isoformat()} for name, one in found.items()]
        typer.echo(json.dumps(listed))
    elif found:
        table = Table("corpus", "bytes", "put at (UTC)", box=None)
        for name, one in found.items():
            table.add_row(name, f"{one.size:,}", f"{one.modified:%Y-%m-%d %H:%M:%S}")
        results().print(table)
    else:
        say("There is no corpus yet. Put one there: mistudio-train corpus put FILE")


@corpus.command(epilog="Example: mistudio-train corpus rm stories.txt")
def rm(name: Annotated[str, typer.Argument(help="As `corpus list` shows it.")]) -> None:
    """Remove a text from the store.

    Exit status: 0 removed, 2 when there is none of that name or the store cannot be used.
    """
    from mistudio_train.worker.corpora import remove_corpus

    with _store() as store:
        remove_corpus(store, name)
    say(f"Removed {name}.")


@contextmanager
def _store() -> "Iterator[Store]":
    from mistudio_train.worker.store import open_store

    store = open_store(load_settings())
    try:
        yield store
    finally:
        store.close()
