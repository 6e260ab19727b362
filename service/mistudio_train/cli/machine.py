"""The command `gpu`: what this machine has."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from .display import results, say

commands = typer.Typer()
GIB = 1024**3


@commands.command(epilog="Example: mistudio-train gpu --json")
def gpu(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """List the GPUs of this machine with their memory, other processes' use included.

    Exit status: 0, also when there is none.
    """
    from mistudio_train.gpu import list_gpus

    gpus = list_gpus()
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in gpus]))
    elif gpus:
        table = Table("GPU", "name", "free GiB", "total GiB", "in use", "capability", box=None)
        for one in gpus:
            sizes = f"{one.free_bytes / GIB:.1f}", f"{one.total_bytes / GIB:.1f}"
            table.add_row(str(one.index), one.name, *sizes, f"{one.utilization:.0%}", one.compute_capability)
        results().print(table)
    else:
        say("No GPU here; jobs run on the CPU.")
