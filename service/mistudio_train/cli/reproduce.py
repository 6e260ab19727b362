"""The command `reproduce`: a finished run done again here from its stored request, and both results compared.

Owns which files must be the same and the words for what differs. Imports no torch; the child does the work.
"""

import asyncio
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from mistudio_schemas import TrainCompleted, TrainFailed, TrainRequested
from mistudio_train.digest import sha256_of
from mistudio_train.settings import Settings

from .display import Bars, results, say, show_end
from .environment import load_settings
from .errors import CliError, Exit
from .finished import FinishedRun, finished_run
from .local_corpus import corpus_here
from .local_model import folder_of_model, hub_token, starts_of
from .look import Job, Run

commands = typer.Typer()
WEIGHTS = re.compile(r"(saes/[^/]+/)?(sae/sae_weights\.safetensors|sae_model\.pt)")
COMPARED = re.compile(r"(saes/[^/]+/)?(sae/sae_weights\.safetensors|sae_model\.pt|feature_activations\.pt|features/.*)")
COMMIT = re.compile(r"@([0-9a-f]{40})$")


@dataclass(frozen=True)
class Compared:
    """A file of both."""

    name: str
    before: str
    after: str | None
    """Its sha256; `None`: it is not there."""

    @property
    def same(self) -> bool:
        """Byte for byte."""
        return self.before == self.after


@commands.command(epilog="Example: mistudio-train reproduce results/ --corpus-folder texts")
def reproduce(
    job: Job,
    corpus_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the corpus is; the store's corpora when left out.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the new files in this folder, which must be empty.")
    ] = None,
    run: Run = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train again from a run's request, model commit, corpus and seeds, and compare the hashes of the files.

    Exit status: 0 all weights are the same, 1 they differ or there is no result, 2 it could not be done.
    """
    settings = load_settings()
    with finished_run(job, _is_needed, run) as found, tempfile.TemporaryDirectory(prefix="mistudio-") as scratch:
        before = found.metadata(found.saes[0])
        request = _request(found, before)
        corpus = corpus_here(request, corpus_folder, Path(scratch), settings)
        _check_corpus(corpus, before["data_info"]["corpus"]["sha256"])
        folder = (to or Path(scratch) / "again").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise CliError(f"the folder {folder} is not empty", "Name another one with --to.")
        event = _again(before["job_id"], request, corpus, folder, settings)
        if isinstance(event, TrainFailed):
            show_end(event)
            raise typer.Exit(Exit.FAILED)
        files = _compared(found.folder, folder)
        after = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    others = differences(before.get("fingerprint", {}), after["fingerprint"])
    same = all(file.same for file in files if WEIGHTS.fullmatch(file.name))
    if as_json:
        said = [{"name": one.name, "before": one.before, "after": one.after} for one in files]
        typer.echo(json.dumps({"same_weights": same, "files": said, "differences": others}))
    else:
        _show(files, others, same)
    raise typer.Exit(Exit.COMPLETED if same else Exit.FAILED)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What numbers depend on and is not as it was, a sentence each."""
    names = sorted({*before, *after})
    return [
        f"{name} was {before.get(name, 'not noted')}, and is {after.get(name, 'not noted')}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _is_needed(name: str) -> bool:
    return name in ("request.json", "saes.json") or name.endswith("metadata.json")


def _request(found: FinishedRun, metadata: dict[str, Any]) -> TrainRequested:
    """As it was accepted, at the commit that was used; nothing is put on the hub again."""
    path = found.folder / "request.json"
    if not path.is_file():
        raise CliError(f"{found.name} has no request.json", "Fetch the whole run: mistudio-train fetch.")
    request = TrainRequested.from_json(path.read_bytes())
    commit = COMMIT.search(str(metadata["model_info"]["actual_model_loaded"]))
    revision = commit[1] if commit else request.model_revision
    return request.model_copy(update={"model_revision": revision, "push_to_hub": None})


def _check_corpus(corpus: Path | None, sha256: str) -> None:
    if corpus is None:
        return
    found = sha256_of(corpus)
    if found != sha256:
        raise CliError(
            f"{corpus} is not the corpus of that run: its sha256 is {found}, and was {sha256}",
            "Name the folder of the corpus as it was, with --corpus-folder.",
        )


def _again(
    job_id: str, request: TrainRequested, corpus: Path | None, folder: Path, settings: Settings
) -> TrainCompleted | TrainFailed:
    from mistudio_train.worker.sinks.feeds import Sinks

    from .local import LocalJob, train_here

    models, token = tuple(folder_of_model(request)), hub_token(request, settings)
    job = LocalJob(job_id, request, corpus, folder, settings, models, starts_of(request), token)
    with Bars() as bars:
        return asyncio.run(train_here(job, bars.show, Sinks(settings.model_copy(update={"sinks": ()}))))


def _compared(before: Path, after: Path) -> list[Compared]:
    """By both manifests; of a run on this disk, too, what was written counts and not what lies there now."""
    first, second = (
        {one["name"]: one["sha256"] for one in json.loads((folder / "manifest.json").read_text())["objects"]}
        for folder in (before, after)
    )
    names = sorted(name for name in first if COMPARED.fullmatch(name))
    return [Compared(name, first[name], second.get(name)) for name in names]


def _show(files: list[Compared], others: list[str], same: bool) -> None:
    table = Table("file", "then", "now", "", box=None)
    for one in files:
        now = (one.after or "not there")[:16]
        table.add_row(escape(one.name), one.before[:16], now, "same" if one.same else "differs")
    results().print(table)
    say("The weights are the same, bit for bit." if same else "The weights differ.")
    for sentence in others:
        say(f"  {sentence}")
    if not same and not others:
        say("  Software, model, corpus and device are as they were: another processor may round otherwise.")
