"""A run's files, up to the store and down again: under the attempt's own prefix, listed in a manifest, verified.

Never writes outside that prefix, and never a name in a reader's folder before its bytes are proven right.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Literal
from uuid import uuid4

from pydantic import Field

from mistudio_schemas import ArtifactRef, Contract, JobId, TrainCompleted
from mistudio_train.errors import ExportRefused, JobError, StoreUnavailable

from .objects import OCTETS, KeyRefused, NotFound, Store, check_key
from .register import Claim

MANIFEST = "manifest.json"
MEDIA_TYPES = {
    ".csv": "text/csv",
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".jsonl": "application/x-ndjson",
    ".md": "text/markdown; charset=utf-8",
    ".parquet": "application/vnd.apache.parquet",
    ".png": "image/png",
    ".txt": "text/plain; charset=utf-8",
}
OnProgress = Callable[[int, int], None]
"""Told bytes done and bytes in all, from the uploading thread; what it raises ends the upload."""


class ArtifactDamaged(JobError):
    """An object is not what its manifest says."""


class Manifest(Contract):
    """Every object of an attempt but the manifest itself; written after all of them."""

    version: Literal[1] = 1
    job_id: JobId
    run: int = Field(ge=1)
    attempt: int = Field(ge=1)
    created: datetime
    objects: list[ArtifactRef]


def upload(store: Store, claim: Claim, folder: Path, on_progress: OnProgress | None = None) -> list[ArtifactRef]:
    """Store every file below `folder` under the attempt's prefix, and see that all of each arrived.

    Raises:
        ExportRefused: if something in the folder is no plain file, or has a name that is ours.
        StoreUnavailable: if the store does not answer, or holds another size than was sent.

    """
    files = _files(folder)
    total, done = sum(path.stat().st_size for path in files.values()), 0

    def on_bytes(more: int) -> None:
        nonlocal done
        done += more
        if on_progress:
            on_progress(done, total)

    refs = [_put(store, claim, name, path, on_bytes) for name, path in files.items()]
    _check_sizes(store, claim, refs)
    return refs


def write_manifest(store: Store, claim: Claim, refs: list[ArtifactRef]) -> ArtifactRef:
    """Store the list of all objects; call it when all of them are there."""
    record = claim.record
    manifest = Manifest(
        job_id=record.job_id, run=record.run, attempt=claim.attempt, created=datetime.now(UTC), objects=refs
    )
    data, key = manifest.to_json(), f"{claim.attempt_prefix}{MANIFEST}"
    store.put_bytes(key, data, MEDIA_TYPES[".json"])
    return _ref(store, MANIFEST, key, len(data), hashlib.sha256(data).hexdigest())


def remove_leftovers(store: Store, claim: Claim) -> None:
    """Of a run that has ended, remove what no event names: checkpoints, and whatever attempts without a result left."""
    manifest = claim.record.manifest
    result = manifest.key.removesuffix(MANIFEST) if manifest else None
    store.delete(
        found.key
        for found in list(store.list(claim.run_prefix))
        if found.key != claim.key
        and (result is None or not found.key.startswith(result) or found.key.startswith(f"{result}checkpoints/"))
    )


def read_manifest(store: Store, key: str, sha256: str) -> Manifest:
    """The manifest that a finished run's record or a completed event names.

    Raises:
        ArtifactDamaged: if it is not the one meant, or is missing.

    """
    try:
        data, _ = store.get_bytes(key)
    except NotFound:
        raise _missing(key) from None
    _check_sha256(key, hashlib.sha256(data).hexdigest(), sha256)
    return Manifest.from_json(data)


def fetch_run(
    store: Store, source: TrainCompleted | Manifest, to: Path, layout: Literal["plain", "mistudio"] = "plain"
) -> list[Path]:
    """Bring a run's files to disk; each gets its name only when all of them are there and verified.

    Args:
        layout: `plain`: every object, as below the attempt's prefix; `mistudio`: the three files of the primary SAE
            where the file-based miStudioFind looks for them.

    Returns:
        The files' paths.

    Raises:
        ArtifactDamaged: if an object is missing or differs from its sha256, or a name leads out of the folder.
        StoreUnavailable: if the store does not answer.
        DiskFull: if it does not fit.

    """
    refs = [*source.artifacts, source.manifest] if isinstance(source, TrainCompleted) else source.objects
    wanted = _plain(refs) if layout == "plain" else _mistudio(refs, source.job_id)
    aside = to / f".fetch-{uuid4().hex}"
    try:
        for name, ref in wanted.items():
            fetch_object(store, ref, aside / name)
        return [_move(aside / name, to / name) for name in wanted]
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def fetch_object(store: Store, ref: ArtifactRef, path: Path) -> None:
    """Bring one object to disk. Raises as `fetch_run`; what it has then written is not to be used."""
    try:
        copied = store.get_file(ref.key, path, ref.bucket)
    except (NotFound, KeyRefused):
        raise _missing(ref.uri) from None
    _check_sha256(ref.uri, copied.sha256, ref.sha256)


def _files(folder: Path) -> dict[str, Path]:
    """Name below the folder to path, in the names' order."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    for name, path in paths.items():
        if path.is_symlink() or not (path.is_file() or path.is_dir()) or name == MANIFEST:
            raise ExportRefused(f"{name} cannot be an artifact", "Write plain files only, and no manifest.json.")
    return {name: path for name, path in paths.items() if path.is_file()}


def _put(store: Store, claim: Claim, name: str, path: Path, on_bytes: Callable[[int], None]) -> ArtifactRef:
    key = f"{claim.attempt_prefix}{name}"
    copied = store.put_file(key, path, _media_type(name), on_bytes)
    return _ref(store, name, key, copied.size, copied.sha256)


def _check_sizes(store: Store, claim: Claim, refs: list[ArtifactRef]) -> None:
    stored = {found.key: found.size for found in store.list(claim.attempt_prefix)}
    wrong = [ref for ref in refs if stored.get(ref.key) != ref.size]
    if wrong:
        ref = wrong[0]
        raise StoreUnavailable(
            f"{ref.key} has {stored.get(ref.key, 'no')} bytes in the store; {ref.size} were sent",
            "Check that nothing else writes to the bucket and that no lifecycle rule empties it.",
        )


def _ref(store: Store, name: str, key: str, size: int, sha256: str) -> ArtifactRef:
    return ArtifactRef(
        name=name,
        bucket=store.bucket,
        key=key,
        uri=store.uri(key),
        size=size,
        sha256=sha256,
        media_type=_media_type(name),
    )


def _media_type(name: str) -> str:
    return MEDIA_TYPES.get(PurePosixPath(name).suffix, OCTETS)


def _plain(refs: list[ArtifactRef]) -> dict[str, ArtifactRef]:
    for ref in refs:
        try:
            check_key(ref.name)
        except KeyRefused as reason:
            raise ArtifactDamaged(f"the run names an unsafe file: {reason}", "Do not trust this event.") from None
    return {ref.name: ref for ref in refs}


def _mistudio(refs: list[ArtifactRef], job_id: str) -> dict[str, ArtifactRef]:
    places = {
        "sae_model.pt": f"models/{job_id}/sae_model.pt",
        "feature_activations.pt": f"activations/{job_id}/feature_activations.pt",
        "metadata.json": f"activations/{job_id}/metadata.json",
    }
    by_name: Mapping[str, ArtifactRef] = {ref.name: ref for ref in refs}
    for name in places:
        if name not in by_name:
            raise ArtifactDamaged(f"the run has no {name}", "Fetch it with the plain layout to see what it has.")
    return {place: by_name[name] for name, place in places.items()}


def _check_sha256(where: str, found: str, expected: str) -> None:
    if found != expected:
        raise ArtifactDamaged(
            f"{where} is damaged: its sha256 is {found}, and {expected} was written",
            "Fetch again; if it stays so, the object was changed in the store: run the job again.",
        )


def _missing(where: str) -> ArtifactDamaged:
    return ArtifactDamaged(
        f"{where} is missing", "See whether it was deleted, and whether this is the store that the event means."
    )


def _move(path: Path, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    return path.replace(to)
