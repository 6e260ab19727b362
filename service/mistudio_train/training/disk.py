"""Arrays that live on the scratch disk: appended once, then read by position, so that memory does not grow with them.

Knows nothing of texts, tokens or tensors; imports no torch.
"""

import errno
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mistudio_schemas import ErrorCode
from mistudio_train.errors import DiskFull


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn the system's "no space left" into ours.

    Raises:
        DiskFull: for ENOSPC and for an exceeded quota; other errors pass through.

    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                "The workspace's disk is full",
                "Free space under DATA_PATH, or ask for fewer tokens (token_budget).",
                ErrorCode.DISK_FULL,
            ) from error
        raise


class ArrayWriter:
    """Appends numbers of one type to a new file."""

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self._file = path.open("wb")

    def append(self, values: Any) -> None:
        """Write an array, a list or one record at the end."""
        with disk_errors():
            self._file.write(np.atleast_1d(np.asarray(values, dtype=self.dtype)).tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        if kind is not None:
            self._file.close()
            return
        with disk_errors():
            self._file.close()


class ArrayFile:
    """Reads a file of numbers of one type by position."""

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self._fd = os.open(path, os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, self._fd)
        self._len = os.fstat(self._fd).st_size // self.dtype.itemsize

    def __len__(self) -> int:
        return self._len

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The numbers `start` to `stop`, in memory of their own.

        Raises:
            EOFError: if the file does not reach so far.

        """
        return np.frombuffer(self.read_bytes(start, stop), dtype=self.dtype)

    def read_bytes(self, start: int, stop: int) -> bytes:
        """The same as bytes."""
        wanted, size = (stop - start) * self.dtype.itemsize, self.dtype.itemsize
        parts: list[bytes] = []
        while wanted > 0:  # one pread gives at most 2 GiB
            part = os.pread(self._fd, wanted, start * size + sum(map(len, parts)))
            if not part:
                raise EOFError(f"{self.path.name} ends before {stop}")
            parts.append(part)
            wanted -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __getitem__(self, part: slice) -> NDArray[Any]:
        """The numbers of a slice without a step, in memory of their own."""
        start, stop, _ = part.indices(len(self))
        return self.read(start, max(start, stop))

    def close(self) -> None:
        """Close the file, as is done in the end anyway; reading afterwards fails."""
        self._close()
