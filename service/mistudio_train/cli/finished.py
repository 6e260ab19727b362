"""A finished run that a command looks at: a job's in the store, or a folder on this disk that `run` or `fetch` left.

Owns where it is found and which of its files are brought; what is in them is the commands' to say.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistudio_schemas import SAEResult, TrainCompleted

from .environment import load_settings
from .errors import CliError
from .request_input import checked_job_id

if TYPE_CHECKING:
    from mistudio_train.worker.run_record import Claim
    from mistudio_train.worker.store import Store

SAES = "saes.json"
PAGE = Path("report") / "index.html"
"""Below an SAE's folder."""
Wanted = Callable[[str], bool]


@dataclass(frozen=True)
class FinishedRun:
    """What there is of it on this disk."""

    name: str
    """The job's id, or the folder as it was named."""
    folder: Path
    saes: list[SAEResult]
    """The primary one first."""

    def sae(self, name: str | None) -> SAEResult:
        """The one of that name; the primary one where none is named.

        Raises:
            CliError: if there is none.

        """
        for one in self.saes:
            if name in (None, one.name):
                return one
        raise CliError(f"{self.name} has no SAE {name}", f"It has {', '.join(one.name for one in self.saes)}.")

    def folder_of(self, sae: SAEResult) -> Path:
        """Where the SAE's files are."""
        return self.folder / sae.prefix.removeprefix(self.saes[0].prefix)

    def metadata(self, sae: SAEResult) -> dict[str, Any]:
        """The SAE's `metadata.json`."""
        found: dict[str, Any] = json.loads((self.folder_of(sae) / "metadata.json").read_text(encoding="utf-8"))
        return found


@contextmanager
def finished_run(what: str, wanted: Wanted, run: int | None = None, to: Path | None = None) -> Iterator[FinishedRun]:
    """Look at a run as long as the block lasts.

    Args:
        what: a job's id; or a folder that has a run's files, then nothing is brought.
        wanted: which files to bring, by their names below the run's root.
        run: of the job; `None`: the newest finished one.
        to: the folder to bring them to, for good; `None`: one that is gone after the block.

    Raises:
        CliError: if there is no such run, or it has no result.

    """
    if (Path(what) / "metadata.json").is_file():
        yield FinishedRun(what, Path(what), _saes(Path(what), what))
        return
    with tempfile.TemporaryDirectory(prefix="mistudio-") as gone:
        folder = to or Path(gone)
        yield FinishedRun(what, folder, _fetched(what, wanted, run, folder).saes)


def finished_claim(store: "Store", job: str, run: int | None) -> "Claim":
    """The record of the run that is meant.

    Raises:
        CliError: if there is none, or it has no result.

    """
    from mistudio_train.worker.register import Register

    runs = list(Register(store).runs(checked_job_id(job), run))
    for claim in runs:
        if claim.record.state == "finished":
            return claim
    which = f"{job} run {run}" if run else job
    if not runs:
        raise CliError(f"the store has no run of {which}", "Check the id with `mistudio-train jobs`, and MINIO_BUCKET.")
    newest = runs[0].record
    raise CliError(f"{which} has no result: run {newest.run} is {newest.state}", f"See why: mistudio-train watch {job}")


def completed_event(claim: "Claim") -> TrainCompleted:
    """What a finished run has ended with."""
    event, _ = claim.ended()
    assert isinstance(event, TrainCompleted)
    return event


def _fetched(job: str, wanted: Wanted, run: int | None, folder: Path) -> TrainCompleted:
    from mistudio_train.worker.artifacts import fetch_run
    from mistudio_train.worker.store import open_store

    store = open_store(load_settings())
    try:
        event = completed_event(finished_claim(store, job, run))
        some = [ref for ref in event.artifacts if wanted(ref.name)]
        fetch_run(store, event.model_copy(update={"artifacts": some}), folder)
    finally:
        store.close()
    return event


def _saes(folder: Path, what: str) -> list[SAEResult]:
    path = folder / SAES
    if not path.is_file():
        raise CliError(f"{what} has no {SAES}", "Name a folder that `run` or `fetch` has written, whole.")
    return [SAEResult.model_validate(one) for one in json.loads(path.read_text(encoding="utf-8"))["saes"]]
