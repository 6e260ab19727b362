"""A run's checkpoints in the store: up while the child works on, and down to whichever worker goes on with the run.

What a checkpoint holds is the child's own; here it is files, and an index that names them. Nothing of another attempt
is written over: an index names what earlier attempts have stored by its key.
"""

import asyncio
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Self

from mistudio_train.errors import StoreUnavailable

from .backoff import backoff
from .objects import KeyRefused, NotFound, Store, check_key
from .register import Claim, RunLost

logger = logging.getLogger(__name__)

KEPT = 2
SHARE_OF_TIME = 0.02
"""Of the run that storing checkpoints may take."""
LINGER_SECONDS = 5.0
"""That is waited for a thread to leave the store."""
PLACES = ("checkpoints/", "scratch/")
"""Where files of a checkpoint may lie in a workspace."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint in the store."""

    number: int
    key: str
    """Of its index."""
    files: dict[str, str]
    """Path in the workspace to key."""
    sha256: dict[str, str]
    """Path in the workspace to what the child says of its content."""
    index: str
    """The child's own."""


def restore(store: Store, claim: Claim, workspace: Path) -> list[Stored]:
    """Bring the run's last checkpoints, the newest first, to the workspace; the child sees which of them is whole.

    Raises:
        StoreUnavailable: if the store does not answer.
        DiskFull: if they do not fit.

    """
    read = (_read(store, key) for key in _indexes(store, claim))
    found = list(islice((one for one in read if one is not None), KEPT))
    files = {name: key for stored in found[::-1] for name, key in stored.files.items()}  # the newest one's win
    for name, key in files.items():
        try:
            store.get_file(key, workspace / name)
        except (NotFound, KeyRefused) as error:
            logger.warning("a file of a checkpoint is not there (%s); the child does without it", error)
    folder = workspace / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    indexes = {stored.number: stored.index for stored in found[::-1]}
    for number, index in indexes.items():  # after the files, so that what was cut off is not taken for whole
        (folder / f"{number:06d}.json").write_text(index)
    return found


def _indexes(store: Store, claim: Claim) -> list[str]:
    """Keys of the run's indexes, the newest checkpoint first; of one number, that of the latest attempt."""
    form = re.compile(re.escape(claim.run_prefix) + r"a(\d+)/checkpoints/(\d{6,})\.json")
    matches = [match for found in store.list(claim.run_prefix) if (match := form.fullmatch(found.key))]
    matches.sort(key=lambda match: (int(match[2]), int(match[1])), reverse=True)
    return [match[0] for match in matches]


def _read(store: Store, key: str) -> Stored | None:
    """Read an index; `None` if it is damaged or gone."""
    try:
        stored = json.loads(store.get_bytes(key)[0])
        number, index, files = int(stored["number"]), str(stored["index"]), dict(stored["files"])
        sha256 = _sha256(index)
        for name in files:
            check_key(name)
            if not name.startswith(PLACES):
                raise KeyRefused(name)
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("the checkpoint %s cannot be used (%s); the one before it is", key, type(error).__name__)
        return None
    return Stored(number, key, files, sha256, index)


def _link(file: Path, link: Path) -> None:
    """A second name of the file, or a copy where the volume knows no links. Raises OSError."""
    try:
        os.link(file, link)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(file, link)


def _sha256(index: str) -> dict[str, str]:
    return {name: str(ref["sha256"]) for name, ref in json.loads(index)["files"].items()}


class CheckpointUploads:
    """Takes the child's newest checkpoint to the store whenever there is time for it, as an async context manager.

    Args:
        known: what `restore` has found; its files are not stored again.
        require_ours: raises `RunLost` once another attempt owns the run.
        on_stored: told the key of each checkpoint in the store.
        on_lost: told that the run is lost; nothing more is stored.

    """

    def __init__(
        self,
        store: Store,
        claim: Claim,
        workspace: Path,
        known: list[Stored],
        require_ours: Callable[[], object],
        on_stored: Callable[[str], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._store, self._workspace = store, workspace
        self._prefix = f"{claim.attempt_prefix}checkpoints/"
        self._kept = known[::-1]
        self._require_ours, self._on_stored, self._on_lost = require_ours, on_stored, on_lost
        self._newest = self._uploaded = 0
        self._wanted = asyncio.Event()
        self._busy = asyncio.Lock()
        self._over, self._storing = False, threading.Lock()
        self._task: asyncio.Task[None] | None = None
        self.lost: RunLost | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._over = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        # nothing is to be stored after what comes next, which may be the removal of all that was stored
        await asyncio.to_thread(self._storing.acquire, timeout=LINGER_SECONDS)

    @property
    def kept(self) -> list[Stored]:
        """The run's last checkpoints in the store, the newest first."""
        return self._kept[::-1]

    def hear(self, number: int) -> None:
        """A checkpoint is whole on disk."""
        self._newest = number
        self._wanted.set()

    async def flush(self, deadline: float) -> bool:
        """Store the newest checkpoint now; whether that was done by the deadline (the loop's clock)."""
        try:
            async with asyncio.timeout_at(deadline):
                for delay in backoff((0.5, 1.0)):
                    if await self._store_newest() is not None:
                        return True
                    await asyncio.sleep(delay)
        except TimeoutError:
            pass
        return False

    async def _follow(self) -> None:
        """For as long as the child works: the newest checkpoint, then a pause that keeps to the share of the time."""
        waits = backoff()
        while self.lost is None:
            await self._wanted.wait()
            self._wanted.clear()
            seconds = await self._store_newest()
            if seconds is None:
                self._wanted.set()
                await asyncio.sleep(next(waits))
            else:
                waits = backoff()
                await asyncio.sleep(seconds / SHARE_OF_TIME - seconds)

    async def _store_newest(self) -> float | None:
        """Seconds that it took; `None` if it failed and may be tried again."""
        async with self._busy:
            number, began = self._newest, time.monotonic()
            if number == self._uploaded or self.lost is not None:
                return 0.0
            try:
                await asyncio.to_thread(self._upload, number)
            except FileNotFoundError:  # the child has written two more meanwhile, and will be heard
                return None
            except (StoreUnavailable, OSError) as error:
                logger.warning("checkpoint %d is not in the store yet: %s", number, error)
                return None
            except RunLost as error:
                self.lost = error
                self._on_lost()
                return 0.0
            self._uploaded = number
            self._on_stored(self._kept[-1].key)
            return time.monotonic() - began

    def _upload(self, number: int) -> None:
        with self._storing:
            self._store_checkpoint(number)

    def _require_time(self, _: int = 0) -> None:
        if self._over:
            raise StoreUnavailable("the child has ended, and so has the time for its checkpoint", "Nothing is lost.")

    def _store_checkpoint(self, number: int) -> None:
        self._require_ours()
        index = (self._workspace / "checkpoints" / f"{number:06d}.json").read_text()
        sha256 = _sha256(index)
        there = {
            name: key
            for stored in self._kept
            for name, key in stored.files.items()
            if stored.sha256.get(name) == sha256.get(name)
        }
        outgoing = self._workspace / "outgoing"
        shutil.rmtree(outgoing, ignore_errors=True)
        links = {name: outgoing / name for name in sha256 if name not in there}
        for name, link in links.items():  # the child may let go of the files meanwhile
            link.parent.mkdir(parents=True, exist_ok=True)
            _link(self._workspace / name, link)
        for name, link in links.items():
            there[name] = f"{self._prefix}files/{name}"
            self._store.put_file(there[name], link, on_bytes=self._require_time)
            link.unlink()
        files = {name: there[name] for name in sha256}
        stored = Stored(number, f"{self._prefix}{number:06d}.json", files, sha256, index)
        content = {"number": number, "index": stored.index, "files": stored.files}
        self._require_time()
        self._require_ours()  # else a successor's index would be younger and worth less
        self._store.put_bytes(stored.key, json.dumps(content).encode(), "application/json")
        self._prune(stored)

    def _prune(self, newest: Stored) -> None:
        """Of the run's checkpoints the last two stay."""
        kept = [*self._kept, newest]
        named = {key for stored in kept[-KEPT:] for key in (stored.key, *stored.files.values())}
        old = {key for stored in kept[:-KEPT] for key in (stored.key, *stored.files.values())} - named
        if old:
            self._store.delete(sorted(old))
        self._kept = kept[-KEPT:]
