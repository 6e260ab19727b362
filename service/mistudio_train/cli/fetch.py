"""The command `fetch`: a finished run's files from the store to this disk. Needs no Kafka."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from .display import say
from .environment import load_settings
from .finished import completed_event, finished_claim

commands = typer.Typer()
MEANING = {
    "sae_model.pt": "the SAE's weights",
    "feature_activations.pt": "texts, activations and features, for miStudioFind",
    "metadata.json": "configuration and results",
    "cfg.json": "the SAE for SAELens: SAE.load_from_disk(this folder)",
    "training_log.jsonl": "the curves",
    "index.html": "the report: open it in a browser",
}


@commands.command(epilog="Example: mistudio-train fetch train_20260802_210454_9f86d081 --to results")
def fetch(
    job: Annotated[str, typer.Argument(help="The job's id.")],
    to: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write into; made if missing.")],
    layout: Annotated[
        Literal["plain", "mistudio"],
        typer.Option(help="plain: as in the store; mistudio: models/ and activations/, for a file-based miStudioFind."),
    ] = "plain",
    run: Annotated[int | None, typer.Option(min=1, help="This run; the newest finished one when left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object instead of one path a line.")] = False,
) -> None:
    """Write a finished run's files to disk, each verified by its sha256. Prints their paths.

    Exit status: 0 all there, 2 no such finished run, a damaged file, or the store cannot be used.
    """
    from mistudio_train.worker.artifacts import fetch_run
    from mistudio_train.worker.store import open_store

    store = open_store(load_settings())
    try:
        claim = finished_claim(store, job, run)
        paths = fetch_run(store, completed_event(claim), to, layout)
    finally:
        store.close()
    if as_json:
        typer.echo(json.dumps({"job_id": job, "run": claim.record.run, "files": [str(path) for path in paths]}))
        return
    for path in paths:
        typer.echo(path)
    say(f"Run {claim.record.run} of {job}: {len(paths)} files, all as they were written.")
    for path in paths:
        if path.name in MEANING:
            say(f"  {path}: {MEANING[path.name]}")
