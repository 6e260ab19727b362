"""What an object store is to us: its methods, its errors, and which keys are safe. Knows neither S3 nor a disk layout.

A key is always the whole key in the bucket, `STORE_PREFIX` included: `store.prefix` begins the ones that we make.
"""

import errno
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Protocol
from uuid import uuid4

from mistudio_train.errors import DiskFull, StoreUnavailable

CHUNK = 1024 * 1024
MAX_KEY_BYTES = 1024
OCTETS = "application/octet-stream"
OnBytes = Callable[[int], None]
"""Told how many bytes more have been read; what it raises ends the transfer."""


class NotFound(KeyError):
    """There is no such object."""

    def __str__(self) -> str:
        return f"there is no object {self.args[0]!r}"


class KeyRefused(ValueError):
    """A key that could name something outside its folder."""


class StoreForbids(StoreUnavailable):
    """The store answers, and refuses these credentials. Retryable: an operator mends it, not the requester."""


@dataclass(frozen=True)
class ObjectInfo:
    """One object as the store lists it."""

    key: str
    size: int
    """Bytes."""
    modified: datetime
    """UTC."""
    etag: str | None = None
    """Another one when the object is replaced by other bytes; `None`: the store has none."""


@dataclass(frozen=True)
class Copied:
    """What was read on the way to or from the store."""

    size: int
    """Bytes."""
    sha256: str


class Store(Protocol):
    """Objects in a bucket. Every method may be called from any thread.

    Every method raises `StoreUnavailable` when the store does not answer or refuses, and `KeyRefused` for an unsafe
    key. A conditional put that raises `StoreUnavailable` has an unknown outcome: read it back.
    """

    @property
    def bucket(self) -> str:
        """The bucket; for a directory store, the folder."""
        ...

    @property
    def prefix(self) -> str:
        """What the keys that we make begin with."""
        ...

    def uri(self, key: str) -> str:
        """`s3://bucket/key` or `file:///folder/key`; a key that ends in `/` names a folder."""
        ...

    def ensure(self) -> None:
        """Create the bucket if it is missing."""
        ...

    def put_file(self, key: str, path: Path, media_type: str = OCTETS, on_bytes: OnBytes | None = None) -> Copied:
        """Store a file, read once; an object of that key is replaced."""
        ...

    def put_bytes(self, key: str, data: bytes, media_type: str = OCTETS) -> None:
        """Store `data`; an object of that key is replaced."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> str | None:
        """Store `data` as a new object: its etag, or `None` when there is one already."""
        ...

    def put_if_match(self, key: str, data: bytes, etag: str) -> str | None:
        """Replace the object that has `etag`: the new etag, or `None` when it is another one by now, or gone."""
        ...

    def get_bytes(self, key: str) -> tuple[bytes, str]:
        """An object and its etag. Raises `NotFound`."""
        ...

    def get_file(self, key: str, path: Path, bucket: str | None = None) -> Copied:
        """Write an object to `path`, whole or not at all; of another bucket if named.

        Raises:
            NotFound: if there is no such object or bucket.
            DiskFull: if it does not fit.

        """
        ...

    def stat(self, key: str) -> ObjectInfo:
        """An object's size and time. Raises `NotFound`."""
        ...

    def list(self, prefix: str, bucket: str | None = None) -> Iterator[ObjectInfo]:
        """Every object whose key begins with `prefix`, in the keys' order; of another bucket if named.

        Raises:
            NotFound: if there is no such other bucket.

        """
        ...

    def folders(self, prefix: str) -> Iterator[str]:
        """The names that follow `prefix`, which ends in `/`, up to the next `/`."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; one that is not there is no error."""
        ...

    def close(self) -> None:
        """Give back connections; the store can still be used."""
        ...


def check_key(key: str) -> None:
    """Refuse what another file system, a proxy or a URL parser could take for a way out of the bucket.

    Raises:
        KeyRefused: for an empty, absolute or over-long key, one with `.`, `..` or empty segments, a backslash, or a
            control character.

    """
    _check_text(key)
    if any(segment in ("", ".", "..") for segment in key.split("/")):
        raise KeyRefused(f"{key[:100]!r} is no safe object key: it has an empty, '.' or '..' part")


def check_prefix(prefix: str) -> None:
    """The same for the beginning of keys, which may be empty or end in `/`."""
    if prefix.removesuffix("/"):
        check_key(prefix.removesuffix("/"))
    elif prefix:
        raise KeyRefused("'/' is no safe beginning of object keys")


def _check_text(key: str) -> None:
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise KeyRefused(f"{key[:100]!r} is no safe object key: it is no Unicode text") from None
    if size > MAX_KEY_BYTES:
        raise KeyRefused(f"{key[:100]!r}… is longer than {MAX_KEY_BYTES} bytes")
    if any(char < " " or "\x7f" <= char <= "\x9f" or char == "\\" for char in key):
        raise KeyRefused(f"{key[:100]!r} is no safe object key: it has a backslash or a control character")


class HashingReader:
    """A file that is hashed as it is read."""

    def __init__(self, file: BinaryIO, on_bytes: OnBytes | None = None) -> None:
        self._file, self._on_bytes = file, on_bytes
        self._sha256, self._size = hashlib.sha256(), 0

    def read(self, size: int = CHUNK) -> bytes:
        """The next `size` bytes; fewer at the end."""
        data = self._file.read(size)
        self._sha256.update(data)
        self._size += len(data)
        if self._on_bytes and data:
            self._on_bytes(len(data))
        return data

    @property
    def copied(self) -> Copied:
        """What has been read so far."""
        return Copied(self._size, self._sha256.hexdigest())


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that gets its name when the block ends well, and is gone otherwise; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{uuid4().hex}")
    try:
        with part.open("xb") as file:
            yield file
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def receive(path: Path, chunks: Iterable[bytes]) -> Copied:
    """Write `chunks` to `path`, whole or not at all.

    Raises:
        DiskFull: if they do not fit.

    """
    sha256, size = hashlib.sha256(), 0
    try:
        with whole_file(path) as file:
            for chunk in chunks:
                file.write(chunk)
                sha256.update(chunk)
                size += len(chunk)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"the disk of {path.parent} is full", "Free space on it, or use a larger one.") from None
        raise
    return Copied(size, sha256.hexdigest())
