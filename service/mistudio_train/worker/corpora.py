"""Corpora by name: put, list and remove them in the store, and bring one to a worker's disk.

Judges names and places only; what is in a corpus is the child's to read.
"""

import difflib
import unicodedata
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath

from mistudio_schemas import ErrorCode
from mistudio_train.errors import CorpusRefused
from mistudio_train.settings import Settings

from .buckets import is_in_a_bucket, parted, reading, shown
from .objects import NotFound, ObjectInfo, Store

FORMATS = {
    ".txt": "text/plain",
    ".csv": "text/csv",
    ".json": "application/json",
    ".jsonl": "application/x-ndjson",
    ".parquet": "application/vnd.apache.parquet",
}
"""Suffix to media type; each may be followed by `.gz`."""
MAX_NAME_BYTES = 200
HINTED_NAMES = 1000


def is_on_the_hub(corpus_file: str) -> bool:
    """Whether it is a dataset of the hub, which the child fetches with the hub's token."""
    return corpus_file.startswith("hf://")


def put_corpus(store: Store, name: str, path: Path) -> ObjectInfo:
    """Store a file as the corpus `name`, replacing one of that name.

    Raises:
        CorpusRefused: if the name or the file will not do.

    """
    key = f"{_folder(store)}{checked_name(name)}"
    if not path.is_file():
        raise CorpusRefused(f"there is no file {path}", "Name a file that exists.", ErrorCode.CORPUS_NOT_FOUND)
    suffix = _suffix(name)
    store.put_file(key, path, "application/gzip" if suffix.endswith(".gz") else FORMATS[suffix])
    return store.stat(key)


def list_corpora(store: Store) -> dict[str, ObjectInfo]:
    """Name to size and time of each."""
    folder = _folder(store)
    return {found.key.removeprefix(folder): found for found in store.list(folder)}


def remove_corpus(store: Store, name: str) -> None:
    """Remove a corpus.

    Raises:
        CorpusRefused: if there is none of that name.

    """
    key = f"{_folder(store)}{checked_name(name)}"
    try:
        store.stat(key)
    except NotFound:
        raise _not_found(name, store) from None
    store.delete([key])


def fetch_corpus(corpus_file: str, to: Path, settings: Settings, store: Store) -> Path:
    """The corpus as a local file, its suffix kept: `to/corpus.jsonl.gz`, or in place where it is local already.

    Args:
        corpus_file: a name in the store, else in a folder that the operator allows; `s3://bucket/key`; or a path in
            such a folder.
        to: a folder of ours.

    Raises:
        CorpusRefused: not found, not allowed, or of no format that we read.
        StoreUnavailable: if the store does not answer.
        DiskFull: if it does not fit.

    """
    if is_in_a_bucket(corpus_file):
        return _from_bucket(corpus_file, to, settings, store)
    if "/" in corpus_file or "\\" in corpus_file:
        return _from_folder(corpus_file, settings)
    name = checked_name(corpus_file)
    path = to / f"corpus{_suffix(name)}"
    try:
        store.get_file(f"{_folder(store)}{name}", path)
    except NotFound:
        local = _in_folders(name, settings)
        if local is None:
            raise _not_found(corpus_file, store) from None
        return local
    return path


def checked_name(name: str) -> str:
    """The name of a corpus in the one spelling (NFC) that is stored.

    Raises:
        CorpusRefused: if it could be a path, hides something, or has no suffix of ours.

    """
    plain = unicodedata.normalize("NFC", name)
    if (
        any(char in "/\\" or unicodedata.category(char)[0] == "C" for char in plain)
        or plain != plain.strip()
        or plain.startswith(".")
        or len(plain.encode()) > MAX_NAME_BYTES
    ):
        raise CorpusRefused(
            f"{shown(name)} is no name of a corpus",
            f"Use a plain file name of at most {MAX_NAME_BYTES} bytes: no '/', no control characters, no leading dot.",
            ErrorCode.CORPUS_NOT_ALLOWED,
        )
    _suffix(plain)
    return plain


def _from_bucket(uri: str, to: Path, settings: Settings, store: Store) -> Path:
    bucket, key = parted(uri)
    if bucket not in (store.bucket, *settings.corpus_buckets):
        raise _not_allowed(uri, f"Use one of the buckets {', '.join([store.bucket, *settings.corpus_buckets])}.")
    path = to / f"corpus{_suffix(key)}"
    try:
        with reading(bucket, store, "an object", partial(_not_allowed, uri)):
            store.get_file(key, path, bucket)
    except NotFound:
        hint = "Check bucket and key."
        raise CorpusRefused(f"there is no corpus {shown(uri)}", hint, ErrorCode.CORPUS_NOT_FOUND) from None
    return path


def _from_folder(name: str, settings: Settings) -> Path:
    if any(unicodedata.category(char)[0] == "C" for char in name):
        raise _not_allowed(name, "Use a path without control characters.")
    _suffix(name)
    allowed = ", ".join(str(folder) for folder in settings.corpus_folders)
    if not any(_is_inside(folder / name, folder) for folder in settings.corpus_folders):
        raise _not_allowed(name, f"Use a file in {allowed}, or put it into the store: mistudio-train corpus put FILE")
    found = _in_folders(name, settings)
    if found is None:
        hint = f"Folders that this worker reads: {allowed}."
        raise CorpusRefused(f"there is no corpus {shown(name)}", hint, ErrorCode.CORPUS_NOT_FOUND)
    return found


def _in_folders(name: str, settings: Settings) -> Path | None:
    """The first ordinary file of that name or path that really lies in an allowed folder, links followed."""
    for folder in settings.corpus_folders:
        path = folder / name
        try:
            if _is_inside(path, folder) and path.is_file():
                return path.resolve()
        except PermissionError:
            raise _not_allowed(name, f"Let the worker's user read {folder} and what is in it.") from None
    return None


def _is_inside(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a loop of links, or a name that is too long
        return False


def _suffix(name: str) -> str:
    suffixes = PurePosixPath(name.lower()).suffixes
    ending = "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])
    if ending.removesuffix(".gz") not in FORMATS:
        raise CorpusRefused(
            f"the format of {shown(name)} is not known",
            f"Use a file that ends in {', '.join(FORMATS)}, or in one of these and .gz.",
            ErrorCode.CORPUS_UNREADABLE,
        )
    return ending


def _folder(store: Store) -> str:
    return f"{store.prefix}corpora/"


def _not_allowed(name: str, hint: str) -> CorpusRefused:
    return CorpusRefused(f"the corpus {shown(name)} is not allowed", hint, ErrorCode.CORPUS_NOT_ALLOWED)


def _not_found(name: str, store: Store) -> CorpusRefused:
    folder = _folder(store)
    there = [found.key.removeprefix(folder) for found in islice(store.list(folder), HINTED_NAMES)]
    near = difflib.get_close_matches(name, there, n=3)
    hint = "Put it there: mistudio-train corpus put FILE" + (f". Did you mean {', '.join(near)}?" if near else "")
    return CorpusRefused(f"there is no corpus {shown(name)} in the store", hint, ErrorCode.CORPUS_NOT_FOUND)
