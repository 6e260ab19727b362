"""The command `fetch`: a finished run's files from the store to this disk. Needs no Kafka."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .display import say
from .environment import load_settings
from .errors import CliError
from .request_input import checked_job_id

if TYPE_CHECKING:
    from mistudio_train.worker.run_record import Claim
    from mistudio_train.worker.store import Store

commands = typer.Typer()
MEANING = {
    "sae_model.pt": "the SAE's weights",
    "feature_activations.pt": "texts, activations and features, for miStudioFind",
    "metadata.json": "configuration and results",
    "cfg.json": "the SAE for SAELens: SAE.load_from_disk(this folder)",
    "training_log.jsonl": "the curves",
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
    from mistudio_schemas import TrainCompleted
    from mistudio_train.worker.artifacts import fetch_run
    from mistudio_train.worker.store import open_store

    store = open_store(load_settings())
    try:
        claim = _finished(store, job, run)
        event, _ = claim.ended()
        assert isinstance(event, TrainCompleted)  # what a finished run ends with
        paths = fetch_run(store, event, to, layout)
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


def _finished(store: "Store", job: str, run: int | None) -> "Claim":
    """The record of the run that is meant.

    Raises:
        CliError: if there is none, or it has no result.

    """
    from mistudio_train.worker.register import Register

    runs = [claim for claim in Register(store).runs(checked_job_id(job)) if run in (None, claim.record.run)]
    for claim in runs:
        if claim.record.state == "finished":
            return claim
    which = f"{job} run {run}" if run else job
    if not runs:
        raise CliError(f"the store has no run of {which}", "Check the id with `mistudio-train jobs`, and MINIO_BUCKET.")
    newest = runs[0].record
    raise CliError(f"{which} has no result: run {newest.run} is {newest.state}", f"See why: mistudio-train watch {job}")
