"""Rows of activations in shards on the scratch disk: written by position, read in blocks or gathered at random.

Resident memory does not grow with the rows; knows no model, no tokenizer and no SAE.
"""

import os
import shutil
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mistudio_train.errors import DiskFull, DiskLimit

from .disk import ArrayFile, disk_errors
from .tokens import RowIndex


@dataclass(frozen=True)
class Layout:
    """How rows lie in shards: each a file of contiguous rows, and an open file of the process for every site."""

    d_in: int
    dtype: torch.dtype
    starts: tuple[int, ...]
    """The first row of each shard, and one beyond the last row."""

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.starts[-1]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.d_in * self.dtype.itemsize

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self.starts) - 1

    def bytes_of(self, shard: int) -> int:
        """Size of a whole shard."""
        return (self.starts[shard + 1] - self.starts[shard]) * self.row_bytes

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Shard, first row in it and number of rows, for each shard that rows `start` to `stop` lie in."""
        while start < stop:
            shard = bisect_right(self.starts, start) - 1
            count = min(stop, self.starts[shard + 1]) - start
            yield shard, start - self.starts[shard], count
            start += count

    def path(self, folder: Path, shard: int) -> Path:
        """Of a shard's file."""
        return folder / f"shard-{shard:05d}.bin"

    def open(self, folder: Path, flags: int) -> list[int]:
        """A file descriptor for each shard."""
        return [os.open(self.path(folder, shard), flags, 0o600) for shard in range(self.shards)]


def require_room(folder: Path, layout: Layout, sites: int, limit: int | None) -> None:
    """See that the activations of all sites fit, before anything is computed.

    Args:
        folder: the scratch; activations that an earlier attempt has left there need no more room.
        limit: bytes that the job may take of the disk.

    Raises:
        DiskFull: if the disk has not that much left.
        DiskLimit: if the job may not take so much.

    """
    wanted, free = sites * layout.rows * layout.row_bytes, shutil.disk_usage(folder).free
    there = sum(path.stat().st_blocks * 512 for path in folder.glob("activations/*/*"))
    if limit is not None and wanted > limit:
        raise DiskLimit(wanted, limit)
    if wanted - there > free:
        raise DiskFull(
            f"The activations take {wanted / 1e9:.1f} GB, the workspace's disk has {free / 1e9:.1f} GB left",
            "Free space under DATA_PATH, or ask for fewer tokens (token_budget).",
        )


class ActivationWriter:
    """Writes rows of one site, in any order, each once; shards that are whole already stay as they are."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.layout = folder, layout
        self._shards = layout.open(folder, os.O_CREAT | os.O_WRONLY)
        for shard, file in enumerate(self._shards):
            os.truncate(file, min(os.fstat(file).st_size, layout.bytes_of(shard)))

    def write(self, start: int, rows_ND: Tensor) -> None:
        """Write contiguous rows, the first of which is row `start`.

        Raises:
            DiskFull: if the disk has no room.
        """
        data = _bytes_of(rows_ND.to(self.layout.dtype).contiguous().cpu())
        size = self.layout.row_bytes
        with disk_errors():
            for shard, row, count in self.layout.pieces(start, start + len(rows_ND)):
                part, data = data[: count * size], data[count * size :]
                _write_all(self._shards[shard], part, row * size)

    def finish(self, index: RowIndex) -> "ActivationStore":
        """Close the shards, and open them to read."""
        self.close()
        return ActivationStore(self.folder, self.layout, index)

    def close(self) -> None:
        """Close the shards."""
        _close_all(self._shards)


class ActivationStore:
    """The rows of one site, read-only. Rows of a text are contiguous, in the order of its tokens.

    Read, not mapped: a fault in a mapped file may bring in megabytes around the row, which count as the process' own.
    """

    def __init__(self, folder: Path, layout: Layout, index: RowIndex) -> None:
        self.folder, self.layout, self.index = folder, layout, index
        self._shards = layout.open(folder, os.O_RDONLY)
        self._close = weakref.finalize(self, _close_all, self._shards)
        self._starts = np.asarray(layout.starts, np.int64)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.layout.rows

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.layout.d_in

    @property
    def text_of_row(self) -> ArrayFile:
        """int32 [rows]: which text each row is of."""
        return self.index.text_of_row

    @property
    def position_of_row(self) -> ArrayFile:
        """int32 [rows]: which of its text's tokens each row is; -1 where the row is a whole text."""
        return self.index.position_of_row

    @property
    def token_of_row(self) -> ArrayFile:
        """int32 [rows]: the token's id; -1 where the row is a whole text."""
        return self.index.token_of_row

    def rows_of_text(self, text: int) -> slice:
        """The rows of a text."""
        return self.index.rows_of_text(text)

    def gather(self, indices: NDArray[np.int64]) -> Tensor:
        """Rows by number, in the order given: fp32 [B, d_in], in memory of their own.

        Raises:
            IndexError: if a row is not there.
        """
        index_B = np.asarray(indices, np.int64)
        if len(index_B) and not 0 <= int(index_B.min()) <= int(index_B.max()) < self.rows:
            raise IndexError(f"rows are 0..{self.rows - 1}")
        rows_BD = torch.empty(len(index_B), self.d_in, dtype=self.layout.dtype)
        buffer, size = _bytes_of(rows_BD), self.layout.row_bytes
        shard_B = np.searchsorted(self._starts, index_B, side="right") - 1
        row_B = index_B - self._starts[shard_B]
        places = zip(shard_B.tolist(), (row_B * size).tolist(), range(0, len(buffer), size), strict=True)
        for shard, offset, at in sorted(places):  # in the disk's order
            _read_all(self._shards[shard], buffer[at : at + size], offset)
        return rows_BD.to(torch.float32)

    def blocks(self, rows_per_block: int) -> Iterator[tuple[int, Tensor]]:
        """All rows in order, some at a time: the number of the first, and fp32 [rows, d_in]."""
        for start in range(0, self.rows, rows_per_block):
            yield start, self.read(start, min(start + rows_per_block, self.rows))

    def read(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`: fp32, in memory of their own."""
        rows_ND = torch.empty(stop - start, self.d_in, dtype=self.layout.dtype)
        self.read_into(_bytes_of(rows_ND), start, stop)
        return rows_ND.to(torch.float32)

    def read_into(self, buffer: memoryview, start: int, stop: int) -> None:
        """The bytes of rows `start` to `stop`, as they lie there, into a buffer of their size."""
        size = self.layout.row_bytes
        for shard, row, count in self.layout.pieces(start, stop):
            part, buffer = buffer[: count * size], buffer[count * size :]
            _read_all(self._shards[shard], part, row * size)

    def close(self) -> None:
        """Let the shards go, as is done in the end anyway; reading afterwards fails."""
        self._close()


def _close_all(shards: list[int]) -> None:
    while shards:
        os.close(shards.pop())


def _bytes_of(rows_ND: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    flat: Any = rows_ND.view(torch.uint8).reshape(-1).numpy()
    return memoryview(flat)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _read_all(fd: int, buffer: memoryview, offset: int) -> None:
    while (read := os.preadv(fd, [buffer], offset)) < len(buffer):
        if not read:
            raise EOFError("a shard of activations is shorter than its rows")
        buffer, offset = buffer[read:], offset + read
