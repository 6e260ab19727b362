"""Writes what `torch.load` reads, record by record, so that a tensor larger than memory can go into it.

Owns the format (a zip of one pickle and raw storages); must not know what is in a file or judge it.
"""

import io
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np
import torch
from torch import Tensor

ROOT: Final = "archive"
BLOCK_NUMBERS: Final = 1 << 22
"""Read at once."""
ALIGNMENT: Final = 64
"""Storages begin at a multiple of this, so that they can be mapped into memory."""
PROTOCOL: Final = 2
"""The only pickle protocol that safe loading accepts; it has no frames, so that pickles can be put together."""
LIST_BATCH: Final = 1000
LOCAL_HEADER: Final = 30
ZIP64_FIELD: Final = 20
PADDING_FIELD: Final = 4


@dataclass(frozen=True)
class Matrix:
    """Stands in the pickle for an fp32 tensor of this shape, whose bytes go into the record `data/{key}`."""

    key: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Strings:
    """Stands in the pickle for a list of strings that is written one by one; only at the top level of the object."""

    items: Iterable[str]


@dataclass(frozen=True)
class _Storage:
    matrix: Matrix


class _Pickler(pickle.Pickler):
    """Pickles matrices as torch does, and remembers nothing, so that each pickle stands alone."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, protocol=PROTOCOL)
        self.fast = True

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Matrix):
            return NotImplemented
        stride = torch.empty(obj.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (_Storage(obj), 0, obj.shape, stride, False, OrderedDict())

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        return "storage", torch.FloatStorage, obj.matrix.key, "cpu", obj.matrix.numel


def pickled(content: Mapping[str, object]) -> Iterator[bytes]:
    """The pickle of a dict in pieces, of which none is longer than its largest plain value."""
    yield pickle.PROTO + bytes([PROTOCOL]) + pickle.EMPTY_DICT + pickle.MARK
    for key, value in content.items():
        yield _fragment(key)
        if isinstance(value, Strings):
            yield from _pickled_strings(value.items)
        else:
            yield _fragment(value)
    yield pickle.SETITEMS + pickle.STOP


def _fragment(value: object) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()[2:-1]


def _pickled_strings(items: Iterable[str]) -> Iterator[bytes]:
    yield pickle.EMPTY_LIST
    position = -1
    for position, item in enumerate(items):
        if position % LIST_BATCH == 0:
            yield (pickle.APPENDS if position else b"") + pickle.MARK
        encoded = item.encode("utf-8", "surrogatepass")
        yield pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded
    if position >= 0:
        yield pickle.APPENDS


class TorchArchive:
    """An open archive. Its records are written one after another."""

    def __init__(self, file: IO[bytes], archive: ZipFile, root: str) -> None:
        self._file = file
        self._zip = archive
        self._root = root

    def open(self, name: str) -> IO[bytes]:
        """A record to write to, of any size; close it before the next is opened."""
        info = ZipInfo(f"{self._root}/{name}")
        header = LOCAL_HEADER + len(info.filename.encode()) + PADDING_FIELD + ZIP64_FIELD
        padding = -(self._file.tell() + header) % ALIGNMENT
        info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        return self._zip.open(info, "w", force_zip64=True)

    def write(self, name: str, pieces: Iterable[bytes]) -> None:
        """A whole record."""
        with self.open(name) as record:
            record.writelines(pieces)


@contextmanager
def torch_archive(path: Path, content: Mapping[str, object]) -> Iterator[TorchArchive]:
    """Begin the file with its pickle; the caller writes a record `data/{key}` for every `Matrix` in it.

    `content` holds plain values, `Matrix` at any depth and `Strings` at the top. The same content gives the same bytes.
    """
    with path.open("wb") as file, ZipFile(file, "w", ZIP_STORED) as zipped:
        archive = TorchArchive(file, zipped, ROOT)
        archive.write("data.pkl", pickled(content))
        archive.write("byteorder", [sys.byteorder.encode()])
        yield archive
        archive.write("version", [b"3\n"])


def blocks_of(path: Path, matrix: Matrix) -> Iterator[Tensor]:
    """The rows of a two-dimensional matrix of an archive of ours, some at a time; its strings are not read.

    Raises:
        KeyError: if the archive has no such record.

    """
    rows, columns = matrix.shape
    with ZipFile(path) as zipped, zipped.open(f"{ROOT}/data/{matrix.key}") as record:
        at_once = max(1, BLOCK_NUMBERS // max(1, columns))
        for start in range(0, rows, at_once):
            count = min(at_once, rows - start)
            numbers = np.frombuffer(bytearray(record.read(4 * count * columns)), np.float32)
            yield torch.from_numpy(numbers).view(count, columns)


def write_tensor(record: IO[bytes], tensor: Tensor) -> None:
    """Append a tensor's elements in fp32, row by row."""
    record.write(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
