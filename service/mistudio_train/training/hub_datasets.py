"""Datasets of the hub as corpora: which files a name means, at which commit, and bringing them to the hub's cache.

Speaks only to the hub and its cache on disk, and reads no file; of an error's text the token is taken out.
"""

import glob
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Final

from huggingface_hub import HfApi, constants, get_cached_repo_tree, parse_hf_uri, snapshot_download
from huggingface_hub.errors import HfUriError
from huggingface_hub.utils.tqdm import disable_progress_bars

from mistudio_schemas import ErrorCode
from mistudio_train.errors import CorpusRefused, DiskFull, HubUnreachable, JobError

from .hub import Trouble, spoken

FORMATS: Final = (".parquet", ".jsonl", ".csv", ".txt")
"""Where a name leaves the files open, those of the first of these that there is; others beside them are copies."""
REVISION: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*")
"""It becomes a path in the cache."""
NAMED: Final = 5


@dataclass(frozen=True)
class HubDataset:
    """A dataset's files here."""

    commit: str
    files: dict[str, Path]
    """By their names with the dataset's before them, in the order of the names."""


def fetch_dataset(
    corpus_file: str, commit: str | None, token: str | None, on_file: Callable[[int, int, str], None]
) -> HubDataset:
    """The files that a name means, downloaded where they are not cached.

    A file that is whole is not fetched again, and one goes on in its middle after its connection broke.

    Args:
        corpus_file: `hf://datasets/owner/name[@revision][/path]`; the path is a file, a folder or a pattern.
        commit: in place of the revision, where an earlier attempt has resolved it.
        token: the hub's.
        on_file: told before each file its number, how many there are, and its name.

    Raises:
        CorpusRefused: `corpus.not_found` or `corpus.not_allowed`.
        HubUnreachable: if the hub does not answer, and not all of the files are cached.
        DiskFull: if they do not fit.

    """
    name, revision, path = _parsed(corpus_file)
    disable_progress_bars()
    logging.getLogger("huggingface_hub._snapshot_download").setLevel(logging.ERROR)  # it wonders who asks for no file

    def asked(file: str | None) -> str:
        """The folder of the dataset's files with this one in it; the list of all files is cached beside it."""
        patterns = [] if file is None else [glob.escape(file)]
        offline = constants.is_offline_mode()
        return snapshot_download(
            name,
            repo_type="dataset",
            revision=commit,
            allow_patterns=patterns,
            token=token or False,
            local_files_only=offline,
        )

    def resolved() -> str:
        offline = constants.is_offline_mode()
        found = HfApi(token=token or False).resolve_revision(
            name, repo_type="dataset", revision=revision, local_files_only=offline
        )
        return str(found.resolved)

    def explained(trouble: Trouble) -> JobError:
        return _explained(name, trouble)

    commit = commit or spoken(token, resolved, explained)
    folder = Path(spoken(token, lambda: asked(None), explained))
    listed = spoken(token, lambda: get_cached_repo_tree(name, repo_type="dataset", revision=commit), explained)
    wanted = {file.path: file.size for file in sorted(listed, key=lambda file: file.path)}
    wanted = {file: wanted[file] for file in _chosen(name, path, list(wanted))}
    _require_room(folder, wanted)
    for number, file in enumerate(wanted, 1):
        on_file(number, len(wanted), file)
        spoken(token, lambda file=file: asked(file), explained)  # type: ignore[misc]
    return HubDataset(commit, {f"{name}/{file}": folder / file for file in wanted})


def _parsed(corpus_file: str) -> tuple[str, str | None, str]:
    """Name, revision and path."""
    try:
        found = parse_hf_uri(corpus_file)
    except HfUriError as error:
        raise _no_dataset(corpus_file) from error
    revision = found.revision
    if found.type != "dataset" or (revision is not None and (".." in revision or not REVISION.fullmatch(revision))):
        raise _no_dataset(corpus_file)
    return found.id, revision, found.path_in_repo.strip("/")


def _no_dataset(corpus_file: str) -> CorpusRefused:
    return CorpusRefused(
        f"{corpus_file[:200]!r} names no dataset of the hub",
        "Write hf://datasets/owner/name, then @revision and /path if you like.",
        ErrorCode.CORPUS_NOT_ALLOWED,
    )


def _chosen(name: str, path: str, files: list[str]) -> list[str]:
    """The files that a path means, in order: itself, those it is a pattern of, or the texts below it."""
    if path in files:
        return [path]
    if glob.has_magic(path):
        found = [file for file in files if fnmatchcase(file, path) and _format(file) in (*FORMATS, ".json")]
    else:
        below = [file for file in files if not path or file.startswith(f"{path}/")]
        by_format = ([file for file in below if _format(file) == suffix] for suffix in FORMATS)
        found = next(filter(None, by_format), [])
    if not found:
        there = [file for file in files if _format(file) in FORMATS] or files
        more = f" and {len(there) - NAMED} more" if len(there) > NAMED else ""
        raise CorpusRefused(
            f"The dataset {name} has no file of texts at '{path}'"
            if path
            else f"The dataset {name} has no file of texts",
            f"It has {', '.join(there[:NAMED]) or 'no file'}{more}; what ends in {', '.join(FORMATS)} can be read.",
            ErrorCode.CORPUS_NOT_FOUND,
        )
    return found


def _format(file: str) -> str:
    return PurePosixPath(file.lower().removesuffix(".gz")).suffix


def _require_room(folder: Path, sizes: dict[str, int]) -> None:
    """Before the first of them: a dataset that does not fit would fill the cache of all jobs."""
    cache = Path(constants.HF_HUB_CACHE)
    missing = sum(size for file, size in sizes.items() if not (folder / file).exists())
    if missing and cache.exists() and missing > (free := shutil.disk_usage(cache).free):
        raise DiskFull(
            f"The dataset takes {missing / 1e9:.1f} GB, and the disk of the hub's cache has {free / 1e9:.1f} GB left",
            "Free space there, or name fewer files: hf://datasets/owner/name/path.",
        )


def _explained(name: str, trouble: Trouble) -> JobError:
    """What the hub's trouble means for a corpus."""
    allow = "Accept its terms on the hub, and name a token that may read it (token_name)."
    match trouble:
        case "gated" | "forbidden":
            return CorpusRefused(
                f"The hub does not give the dataset {name} to this worker", allow, ErrorCode.CORPUS_NOT_ALLOWED
            )
        case "revision":
            return CorpusRefused(
                f"The dataset {name} has no such revision on the hub",
                "Check what follows the @.",
                ErrorCode.CORPUS_NOT_FOUND,
            )
        case "missing" | "name" | "entry":
            return CorpusRefused(
                f"The hub has no dataset '{name}', or does not show it to this worker",
                "Check the name; a private dataset needs a token that may read it (token_name).",
                ErrorCode.CORPUS_NOT_FOUND,
            )
        case "offline":
            return CorpusRefused(
                f"This worker works offline, and its cache has not all that is asked for of the dataset {name}",
                "Check the name, or ask the worker's operator to fetch the dataset.",
                ErrorCode.CORPUS_NOT_FOUND,
            )
        case "unreachable":
            return HubUnreachable(
                f"The hub does not answer, and not all of the dataset {name} is in its cache here",
                "Try again when it does.",
            )
