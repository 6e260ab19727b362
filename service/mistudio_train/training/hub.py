"""The model hub: what it has under a name, and bringing the files here. Speaks only to the hub and its cache on disk.

A token is passed on explicitly, is put into no environment variable, and is taken out of every error's text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from mistudio_schemas import ErrorCode
from mistudio_train.errors import HubUnreachable, JobError, ModelRefused
from mistudio_train.model_files import TOKENIZER_FILES, patterns

from .disk import disk_errors

NOT_FOUND_HERE: Final = (RevisionResolutionError, CachedRepoTreeNotFoundError)
"""What the cache has not, said without any of the parents that the others have."""
ANSWER_SECONDS: Final = 5.0
"""The hub must answer within this; a request for an unknown model is refused within seconds."""


@dataclass(frozen=True)
class Listing:
    """A model on the hub, at a commit."""

    commit: str
    config: bytes = field(repr=False)
    """`config.json`."""
    files: tuple[str, ...] = field(repr=False)
    requires_token: bool = False
    folder: Path | None = None
    """Where the cache has it, when the hub was not asked."""


def find(name: str, revision: str | None, token: str | None) -> Listing:
    """What the hub has under `name`; from the cache when the hub does not answer or is not to be asked.

    Raises:
        ModelRefused: `model.not_found` or `model.not_allowed`.
        HubUnreachable: if the hub does not answer, and the model is not cached.

    """
    if constants.is_offline_mode():
        return _cached_or(name, revision, _not_cached(name))
    try:
        return _spoken(name, token, lambda: _ask(name, revision, token))
    except HubUnreachable as error:
        return _cached_or(name, revision, error)


def fetch(name: str, commit: str, token: str | None, *, allow_unsafe: bool = False) -> Path:
    """The folder of the model's files, downloaded where they are not cached.

    Raises:
        ModelRefused, HubUnreachable: as `find`.

    """
    return _fetched(name, commit, token, patterns(allow_unsafe=allow_unsafe))


def fetch_tokenizer(name: str, commit: str, token: str | None) -> Path:
    """The same without the weights.

    Raises:
        ModelRefused, HubUnreachable: as `find`.

    """
    return _fetched(name, commit, token, list(TOKENIZER_FILES))


def _fetched(name: str, commit: str, token: str | None, wanted: list[str]) -> Path:
    folder = _spoken(
        name, token, lambda: snapshot_download(name, revision=commit, allow_patterns=wanted, token=token or False)
    )
    return Path(folder)


def shapes(name: str, commit: str, files: Sequence[str], token: str | None) -> dict[str, tuple[int, ...]]:
    """Name to shape of the weights in these safetensors files, of which only the heads are fetched.

    Raises:
        ModelRefused, HubUnreachable: as `find`.

    """
    api = HfApi(token=token or False)
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        head = _spoken(name, token, partial(api.parse_safetensors_file_metadata, name, file, revision=commit))
        found |= {weight: tuple(tensor.shape) for weight, tensor in head.tensors.items()}
    return found


def without_token(text: str, token: str | None) -> str:
    """The text with the token starred out."""
    return text.replace(token, "***") if token else text


def _ask(name: str, revision: str | None, token: str | None) -> Listing:
    # model_info asks once; hf_hub_download alone would repeat a failing request for 23 s.
    info = HfApi().model_info(name, revision=revision, timeout=ANSWER_SECONDS, token=token or False)
    commit = str(info.sha)
    config = hf_hub_download(name, "config.json", revision=commit, etag_timeout=ANSWER_SECONDS, token=token or False)
    files = tuple(file.rfilename for file in info.siblings or ())
    return Listing(commit, Path(config).read_bytes(), files, bool(info.gated or info.private))


def _cached_or(name: str, revision: str | None, otherwise: JobError) -> Listing:
    """What the cache has of the model.

    Raises:
        JobError: `otherwise`, if that is nothing.

    """
    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        config = None
    if not isinstance(config, str):
        raise otherwise
    folder = Path(config).parent
    files = tuple(sorted(path.name for path in folder.iterdir()))
    return Listing(folder.name, Path(config).read_bytes(), files, folder=folder)


Answer = TypeVar("Answer")


Trouble = Literal["gated", "forbidden", "revision", "missing", "name", "entry", "offline", "unreachable"]
"""What is wrong, as the hub says it; what it means is for whoever has asked to say."""


def spoken(token: str | None, ask: Callable[[], Answer], explained: Callable[[Trouble], JobError]) -> Answer:
    """What `ask` gives, with the hub's errors said in our words.

    Raises:
        JobError: what `explained` makes of the trouble; its cause shows no token.
        DiskFull: if the cache's disk has no room.

    """
    try:
        with disk_errors():
            return ask()
    except (*NOT_FOUND_HERE, EntryNotFoundError, HFValidationError, httpx2.HTTPError, OSError) as error:
        leaks = token is not None and token in str(error)
        raise explained(_trouble(error)) from (None if leaks else error)


def _spoken(name: str, token: str | None, ask: Callable[[], Answer]) -> Answer:
    return spoken(token, ask, partial(_explained, name))


def _trouble(error: Exception) -> Trouble:
    """The more particular classes come first, because the others are their parents."""
    match error:
        case GatedRepoError():
            return "gated"
        case RevisionNotFoundError():
            return "revision"
        case RepositoryNotFoundError():
            return "missing"
        case (
            LocalEntryNotFoundError()
            | OfflineModeIsEnabled()
            | RevisionResolutionError()
            | CachedRepoTreeNotFoundError()
        ) if constants.is_offline_mode():
            return "offline"
        case EntryNotFoundError() if not isinstance(error, LocalEntryNotFoundError):
            return "entry"
        case HFValidationError():
            return "name"
        case HfHubHTTPError() if error.response is not None and error.response.status_code in (401, 403):
            return "forbidden"
    return "unreachable"


def _explained(name: str, trouble: Trouble) -> JobError:
    """What the hub's trouble means for a model."""
    match trouble:
        case "gated":
            return ModelRefused(
                f"{name} is gated, and the hub does not give it to this worker",
                "Accept its terms on the hub and name a token that may read it (token_name).",
                ErrorCode.MODEL_NOT_ALLOWED,
            )
        case "revision":
            return ModelRefused(f"{name} has no such revision on the hub", "Check model_revision.")
        case "missing":
            return ModelRefused(
                f"The hub has no model '{name}', or does not show it to this worker",
                "Check the name; a private model needs a token that may read it (token_name).",
            )
        case "offline":
            return _not_cached(name)
        case "entry":
            return ModelRefused(f"{name} has no config.json", "Name a transformers model.", ErrorCode.MODEL_UNSUPPORTED)
        case "name":
            return ModelRefused(f"'{name}' is no model's name", "Give a hub's name, owner/name.")
        case "forbidden":
            return ModelRefused(
                f"The hub does not give {name} to this worker",
                "Name a token that may read it (token_name).",
                ErrorCode.MODEL_NOT_ALLOWED,
            )
        case "unreachable":
            return HubUnreachable(
                f"The model hub does not answer, and {name} is not in its cache here", "Try again when it does."
            )


def _not_cached(name: str) -> ModelRefused:
    return ModelRefused(
        f"This worker works offline, and '{name}' is not in its cache",
        "Check the name, or ask the worker's operator to fetch the model.",
    )
