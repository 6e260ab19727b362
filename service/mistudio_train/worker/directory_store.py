"""An object store in a folder, for one machine: a key is a path. Knows no job; nothing outside the folder is touched.

Every change is a rename or a removal under one lock file, so conditional puts hold between threads and processes.
`.mistudio/` in the folder has the lock and unfinished files.
"""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from mistudio_train.errors import StoreUnavailable

from .objects import (
    CHUNK,
    OCTETS,
    Copied,
    HashingReader,
    KeyRefused,
    NotFound,
    ObjectInfo,
    OnBytes,
    check_key,
    check_prefix,
    receive,
)

OWN = ".mistudio"
LOCK_POLL_SECONDS = 0.005


class DirectoryStore:
    """Objects below `path`; an object's etag is its sha256.

    Args:
        prefix: what the keys that the worker makes begin with.
        lock_seconds: how long to wait for another process' change.

    """

    def __init__(self, path: Path, prefix: str = "", *, lock_seconds: float = 60.0) -> None:
        check_prefix(prefix)
        self._root = path.absolute()
        self._prefix, self._lock_seconds = prefix, lock_seconds

    @property
    def bucket(self) -> str:
        """The folder."""
        return str(self._root)

    @property
    def prefix(self) -> str:
        """What the keys that we make begin with."""
        return self._prefix

    def uri(self, key: str) -> str:
        """`file:///folder/key`."""
        check_prefix(key)
        return f"{self._path(key.removesuffix('/')).as_uri()}{'/' if key.endswith('/') else ''}"

    def ensure(self) -> None:
        """Create the folder, and see that it can be written to."""
        with self._asking("be written to"):
            self._root.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass

    def put_file(self, key: str, path: Path, media_type: str = OCTETS, on_bytes: OnBytes | None = None) -> Copied:
        """Store a copy of a file."""
        del media_type  # a folder keeps none
        with path.open("rb") as file:
            reader = HashingReader(file, on_bytes)
            self._put(key, iter(reader.read, b""), lambda _: True)
            return reader.copied

    def put_bytes(self, key: str, data: bytes, media_type: str = OCTETS) -> None:
        """Store `data`."""
        del media_type
        self._put(key, [data], lambda _: True)

    def put_if_absent(self, key: str, data: bytes) -> str | None:
        """Store `data` as a new object: its etag, or `None` when there is one already."""
        return _etag(data) if self._put(key, [data], lambda path: not path.exists()) else None

    def put_if_match(self, key: str, data: bytes, etag: str) -> str | None:
        """Replace the object that has `etag`: the new etag, or `None` when it is another one by now, or gone."""

        def unchanged(path: Path) -> bool:
            return path.is_file() and _etag(path.read_bytes()) == etag

        return _etag(data) if self._put(key, [data], unchanged) else None

    def get_bytes(self, key: str) -> tuple[bytes, str]:
        """An object and its etag. Raises `NotFound`."""
        with self._asking(f"give {key}"), self._reading(key) as file:
            data = file.read()
        return data, _etag(data)

    def get_file(self, key: str, path: Path, bucket: str | None = None) -> Copied:
        """Copy an object to `path`, whole or not at all. Raises `NotFound`, also for every S3 bucket."""
        # a folder may have been moved since its keys were noted with its path
        if bucket is not None and not Path(bucket).is_absolute():
            raise NotFound(f"s3://{bucket}/{key}")
        with self._asking(f"give {key}"), self._reading(key) as file:
            return receive(path, iter(lambda: file.read(CHUNK), b""))

    def stat(self, key: str) -> ObjectInfo:
        """An object's size and time. Raises `NotFound`."""
        with self._asking(f"tell of {key}"), self._reading(key) as file:
            return _info(key, os.fstat(file.fileno()))

    def list(self, prefix: str, bucket: str | None = None) -> Iterator[ObjectInfo]:
        """Every object whose key begins with `prefix`, in the keys' order. Raises `NotFound` for every S3 bucket."""
        check_prefix(prefix)
        if bucket is not None and not Path(bucket).is_absolute():
            raise NotFound(f"s3://{bucket}/{prefix}")
        with self._asking(f"list {prefix}"):
            self._root.stat()
            yield from sorted(self._found(prefix), key=lambda info: info.key.encode())

    def folders(self, prefix: str) -> Iterator[str]:
        """The names that follow `prefix`, which ends in `/`, up to the next `/`."""
        check_prefix(prefix)
        folder = self._root / prefix
        with self._asking(f"list {prefix}"):
            self._root.stat()
            if folder.is_dir():
                yield from sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name != OWN)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; one that is not there is no error."""
        with self._asking("delete objects"), self._locked():
            for path in [self._path(key) for key in keys]:
                path.unlink(missing_ok=True)
                self._remove_empty(path.parent)

    def close(self) -> None:
        """Nothing is held."""

    def _path(self, key: str) -> Path:
        check_key(key)
        if key.split("/")[0] == OWN:
            raise KeyRefused(f"{OWN}/ is the store's own")
        return self._root / key

    def _put(self, key: str, chunks: Iterable[bytes], allowed: Callable[[Path], bool]) -> bool:
        """Write the object aside, then give it its name if that is `allowed`."""
        target, part = self._path(key), self._root / OWN / f"part-{uuid4().hex}"
        with self._asking(f"store {key}"):
            part.parent.mkdir(exist_ok=True)
            try:
                _write_through(part, chunks)
                with self._locked():
                    if not allowed(target):
                        return False
                    target.parent.mkdir(parents=True, exist_ok=True)
                    part.replace(target)
                    return True
            finally:
                part.unlink(missing_ok=True)

    @contextmanager
    def _reading(self, key: str) -> Iterator[BinaryIO]:
        try:
            file = self._path(key).open("rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            self._root.stat()
            raise NotFound(key) from None
        with file:
            yield file

    def _found(self, prefix: str) -> Iterator[ObjectInfo]:
        top = self._root / prefix.rpartition("/")[0]
        for folder, subfolders, names in os.walk(top):
            if Path(folder) == self._root and OWN in subfolders:
                subfolders.remove(OWN)
            for path in (Path(folder, name) for name in names):
                key = path.relative_to(self._root).as_posix()
                with suppress(FileNotFoundError):  # deleted meanwhile
                    if key.startswith(prefix):
                        yield _info(key, path.stat())

    def _remove_empty(self, folder: Path) -> None:
        while folder != self._root:
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # only `ensure` makes the folder itself: a disk that is not mounted must not look like an empty store
        (self._root / OWN).mkdir(exist_ok=True)
        with (self._root / OWN / "lock").open("ab") as file:
            self._wait_for(file)
            yield  # closing the file gives the lock back

    def _wait_for(self, lock: BinaryIO) -> None:
        until = time.monotonic() + self._lock_seconds
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise StoreUnavailable(
                        f"the store's folder {self._root} has been locked for {self._lock_seconds:g} s",
                        f"See which process holds {OWN}/lock in it.",
                    ) from None
            time.sleep(LOCK_POLL_SECONDS)

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = errno.errorcode.get(error.errno or 0, type(error).__name__)
            raise StoreUnavailable(
                f"the store's folder {self._root} cannot {what}: {reason}",
                "Check that STORE_PATH exists, is writable for the worker, and has room.",
            ) from error


def _write_through(path: Path, chunks: Iterable[bytes]) -> None:
    """To the disk itself: a record that is lost with the machine would be a job run twice."""
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _info(key: str, stat: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))
