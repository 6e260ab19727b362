"""Models on this worker's disk that were brought from elsewhere: each once, for its jobs and for workers beside it.

Owns `DATA_PATH/cache/models`, where a folder has the name of its content; knows no bucket and reads no model. Locks end
with the process that holds them: a folder that is used is locked, and one worker at a time brings or removes any.
"""

import fcntl
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mistudio_schemas import ErrorCode
from mistudio_train.disk_use import bytes_in
from mistudio_train.errors import DiskFull, ModelRefused

POLL_SECONDS = 0.1
PART = ".part-"
"""Begins the names of folders that are not whole yet."""


class HeldModel:
    """A model's folder, which stays as long as this object does."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self.release = weakref.finalize(self, os.close, lock)
        """Let it go before that."""


class ModelCache:
    """Folders of models, together no larger than `max_bytes`; the one longest unused goes first."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root, self._max_bytes = root, max_bytes

    def hold(
        self, content: str, size: int, fill: Callable[[Path], None], go_on: Callable[[], None] = lambda: None
    ) -> HeldModel:
        """The folder of that content, filled if it is not there.

        Args:
            content: names what is in it.
            size: bytes of all its files.
            fill: brings the files into a folder, in which an earlier attempt may have left some.
            go_on: called while it waits for another worker; what it raises ends the wait.

        Raises:
            ModelRefused: if it is larger than all models together may be.
            DiskFull: if the others are all in use, or the disk has no room.

        """
        if size > self._max_bytes:
            taken, limit = f"{size / 1e9:.1f} GB", f"{self._max_bytes / 1e9:.1f} GB"
            raise ModelRefused(
                f"the model takes {taken} of the worker's disk; {limit} are the limit of all models together",
                "Name a smaller one, or have the operator raise MODEL_CACHE_MAX_BYTES.",
                ErrorCode.MODEL_NOT_ALLOWED,
            )
        self._root.mkdir(parents=True, exist_ok=True)
        while True:
            go_on()
            if (held := self._held(content)) is not None:
                return held
            with _locked(self._root, fcntl.LOCK_EX) as alone:
                if alone is not None and not (self._root / content).is_dir():
                    self._bring(content, size, fill)
            if alone is None:
                time.sleep(POLL_SECONDS)

    def _held(self, content: str) -> HeldModel | None:
        folder = self._root / content
        lock = _lock(folder, fcntl.LOCK_SH)
        if lock is None:
            return None
        os.utime(folder)
        return HeldModel(folder, lock)

    def _bring(self, content: str, size: int, fill: Callable[[Path], None]) -> None:
        part = self._root / f"{PART}{content}"
        part.mkdir(exist_ok=True)
        self._make_room(size, part)
        fill(part)
        part.rename(self._root / content)

    def _make_room(self, size: int, part: Path) -> None:
        others = [path for path in self._root.iterdir() if path != part]
        taken = {path: bytes_in(path) for path in sorted(others, key=lambda path: path.stat().st_mtime)}
        for path in taken:
            if sum(taken.values()) + size <= self._max_bytes and self._fits(size, part):
                return
            with _locked(path, fcntl.LOCK_EX) as unused:
                if unused is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    taken[path] = 0
        if sum(taken.values()) + size > self._max_bytes or not self._fits(size, part):
            raise DiskFull(
                f"there is no room for another model of {size / 1e9:.1f} GB beside those in use",
                "Free space below DATA_PATH, or have the operator raise MODEL_CACHE_MAX_BYTES.",
            )

    def _fits(self, size: int, part: Path) -> bool:
        return size - bytes_in(part) <= shutil.disk_usage(self._root).free


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[int | None]:
    """Hold a folder's lock; `None`: another process, or another job, has it."""
    lock = _lock(folder, how)
    try:
        yield lock
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, how: int) -> int | None:
    """A descriptor whose lock ends with it; `None`: it is held otherwise, or not there (any more)."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
        if folder.stat().st_ino == os.fstat(lock).st_ino:
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None
