"""Puts the SAELens folders with their cards into a repository of the hub, when all files of a job are whole.

Owns what is where in it and how a failure is said; fails no job, waits for no hub longer than it may, shows no token.
"""

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from mistudio_train.messages import Push

from .reporter import INTERVAL, Reporter

SHARE: Final = (1.0, 1.0)
REFUSED: Final = (401, 403, 404)
"""What the hub answers to a token that may not: it does not say which repositories there are."""

logger = logging.getLogger(__name__)


def push_result(push: Push, output: Path, reporter: Reporter) -> None:
    """Do it, or warn.

    Args:
        push: where to.
        output: the job's files.
        reporter: told what is done, and warned of what was not.

    """
    files = dict(_files(output))
    if not files:
        reporter.warn(f"nothing was put into {push.repository} on the hub: SAELens has no words for this kind of SAE")
        return
    if without := [folder.name for folder in sorted(output.glob("saes/*")) if not (folder / "sae").exists()]:
        reporter.warn(f"{', '.join(without)} has no SAELens folder, and is not put into {push.repository} on the hub")
    reporter.enter("uploading", f"putting {len(files)} files into {push.repository} on the hub", SHARE)
    if trouble := _trouble(push, files, reporter):
        reporter.warn(
            f"{push.repository} on the hub has perhaps not got the result: {trouble} The result is whole here; to put "
            f"its folder sae/ there by hand: hf upload {push.repository} sae"
        )


def _files(output: Path) -> Iterator[tuple[str, Path]]:
    """Place in the repository to file: the primary SAE's at its root, where the hub looks for the card."""
    for folder in (output / "sae", *sorted((output / "saes").glob("*/sae"))):
        for path in sorted(folder.glob("*")):
            yield (folder.parent.relative_to(output) / path.name).as_posix(), path


def _trouble(push: Push, files: dict[str, Path], reporter: Reporter) -> str | None:
    """Why it was not done; `None`: it was. In a thread of its own, as no call to the hub can be called off."""
    found: list[str | None] = []
    worker = threading.Thread(target=lambda: found.append(_push(push, files)), name="hub-push", daemon=True)
    worker.start()
    deadline = time.monotonic() + push.seconds
    while worker.is_alive() and (left := deadline - time.monotonic()) > 0:
        worker.join(min(INTERVAL, left))
        reporter.say(1.0)
    return found[0] if found else f"it took longer than {push.seconds:g} s (HUB_PUSH_SECONDS)."


def _push(push: Push, files: dict[str, Path]) -> str | None:
    """All files are one commit: a reader sees all of them or none."""
    try:
        api = HfApi(token=push.token)
        api.create_repo(push.repository, private=True, exist_ok=True)
        added = [CommitOperationAdd(place, path) for place, path in files.items()]
        commit = api.create_commit(push.repository, added, commit_message="SAEs trained by miStudioTrain")
    except Exception as error:  # whatever it is, the job has its result
        logger.info("no push to the hub: %s", type(error).__name__)
        return _why(error, push.repository)
    logger.info("%s on the hub is at commit %s", push.repository, commit.oid)
    return None


def _why(error: Exception, repository: str) -> str:
    """In our words alone: an error's own text may show what was sent."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # of one file's upload
        error = error.__cause__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in REFUSED:
        owner = repository.partition("/")[0]
        return f"the hub refuses this worker's token ({status}); its operator must let HF_TOKEN write for {owner}."
    if status is not None:
        return f"the hub answers {status}; try again when it does better."
    if isinstance(error, HFValidationError):
        return "the hub takes no repository of that name; correct push_to_hub."
    if constants.is_offline_mode():
        return "this worker works offline (HF_HUB_OFFLINE)."
    if isinstance(error, httpx2.TransportError):
        return "the hub does not answer; try again when it does."
    return f"the hub's client gave up ({type(error).__name__})."
