"""Trained SAEs that training goes on from: which a request may name, and bringing one to the worker's disk, verified.

Judges names and places only; what is in a file is the child's to read.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mistudio_schemas import ArtifactRef, ErrorCode, TrainCompleted
from mistudio_train.errors import StartRefused
from mistudio_train.settings import Settings
from mistudio_train.start_files import CFG, NAMES, WEIGHTS

from .artifacts import ArtifactDamaged, fetch_object, read_manifest
from .buckets import is_in_a_bucket, parted, reading, shown
from .objects import KeyRefused, NotFound, Store
from .register import Claim, Register

FORMS = "Name a run (job_id, job_id/run or job_id/run/name), s3://bucket/path, or a folder by its whole path."


def fetch_starts(
    names: Sequence[str], to: Path, settings: Settings, store: Store, register: Register
) -> dict[str, Path]:
    """The folder of each, below `to` or, of one that is local, where it is.

    Args:
        names: `init_from` of the request's SAEs, each once.
        to: a folder of ours.
        settings: say which buckets and folders; they are those of models.
        store: the worker's.
        register: of the runs in it.

    Raises:
        StartRefused: `sae.not_found` or `sae.not_allowed`, or `sae.unsuitable` of a run whose objects are damaged.
        StoreUnavailable: if the store does not answer.

    """
    folders = {}
    for number, name in enumerate(names):
        folder = to / str(number)
        if is_in_a_bucket(name):
            _from_bucket(name, folder, settings, store)
        elif name.startswith("/"):
            folder = _local(name, settings)
        else:
            _from_run(name, folder, store, register)
        folders[name] = folder
    return folders


def _from_bucket(name: str, to: Path, settings: Settings, store: Store) -> None:
    bucket, path = parted(name)
    allowed = [store.bucket, *settings.model_buckets]
    if bucket not in allowed or not path.strip("/"):
        raise _not_allowed(name, f"Name a folder in one of the buckets {', '.join(allowed)}.")
    for file in NAMES:
        try:
            with reading(bucket, store, "a folder", partial(_not_allowed, name)):
                store.get_file(f"{path.rstrip('/')}/{file}", to / file, bucket)
        except NotFound:
            if file in (CFG, WEIGHTS):
                raise _not_found(name, f"it has no {file}", "Check bucket and path.") from None
            (to / file).unlink(missing_ok=True)  # an earlier attempt's, when there still was one


def _local(name: str, settings: Settings) -> Path:
    folders = settings.local_model_folders
    try:
        folder = Path(name).resolve()
        if not any(folder.is_relative_to(allowed.resolve()) for allowed in folders):
            hint = f"Use a folder below {', '.join(map(str, folders))}." if folders else "This worker reads none."
            raise _not_allowed(name, hint)
        if not folder.is_dir():
            raise _not_found(name, "it is no folder", "Check the path.")
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name that is too long, a null
        raise _not_found(name, "it is no folder", "Check the path.") from None
    return folder


def _from_run(name: str, to: Path, store: Store, register: Register) -> None:
    job_id, run, sae = _parts(name)
    claim = _finished(name, job_id, run, register)
    event, _ = claim.ended()
    assert isinstance(event, TrainCompleted)  # what a finished run ends with, and its manifest is kept
    assert claim.record.manifest is not None
    place = _place(name, event, sae)
    try:
        manifest = read_manifest(store, claim.record.manifest.key, claim.record.manifest.sha256)
        refs = {ref.name: ref for ref in manifest.objects}
        found: dict[str, ArtifactRef] = {file: refs[place + file] for file in NAMES if place + file in refs}
        if CFG not in found:
            raise StartRefused(
                f"{name} has no {place}{CFG}: it is of a kind that SAELens cannot say", "Name another SAE."
            )
        for file, ref in found.items():
            fetch_object(store, ref, to / file)
    except ArtifactDamaged as error:
        raise StartRefused(f"the SAE {name} cannot be gone on from: {error}", "Name another run.") from None


def _parts(name: str) -> tuple[str, int | None, str | None]:
    job_id, *rest = name.split("/")
    if not job_id or len(rest) > 2 or not all(rest) or (rest and not (rest[0].isascii() and rest[0].isdecimal())):
        raise _not_found(name, "that names no run", FORMS)
    return job_id, int(rest[0]) if rest else None, rest[1] if len(rest) == 2 else None


def _finished(name: str, job_id: str, run: int | None, register: Register) -> Claim:
    """The run, or the newest of the job that has a result."""
    try:
        claims = list(register.runs(job_id, run))
    except KeyRefused:
        raise _not_found(name, "that names no run", FORMS) from None
    for claim in claims:
        if claim.record.state == "finished":
            return claim
    reason = f"it is {claims[0].record.state}" if claims else "the store knows no such run"
    raise _not_found(name, reason, "Name a run that has completed. " + FORMS)


def _place(name: str, event: TrainCompleted, sae: str | None) -> str:
    """The folder of the SAE below the run's root."""
    names = [one.name for one in event.saes]
    if sae is None or sae == names[0]:
        return "sae/"
    if sae not in names:
        raise _not_found(name, f"the run has no SAE {sae}", f"It has {', '.join(names)}.")
    return f"saes/{sae}/sae/"


def _not_found(name: str, reason: str, hint: str) -> StartRefused:
    return StartRefused(f"there is no SAE {shown(name)} to go on from: {reason}", hint, ErrorCode.SAE_NOT_FOUND)


def _not_allowed(name: str, hint: str) -> StartRefused:
    return StartRefused(f"the SAE {shown(name)} is not allowed", hint, ErrorCode.SAE_NOT_ALLOWED)
