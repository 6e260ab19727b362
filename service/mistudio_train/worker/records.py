"""Records whose headers have names that are no UTF-8: read all the same, where aiokafka would stop for ever.

aiokafka 0.14 decodes names strictly while it goes through a batch, so that one such record ends every consumer that
meets it, again and again. Its own Python reader is used here with one change; nothing else of it is touched.
"""

from typing import Any

from aiokafka.consumer import fetcher
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import _MemoryRecordsPy


def read_any_header_name() -> None:
    """From now on consumers of this process give such bytes as lone surrogates, as Python does for file names."""
    fetcher.MemoryRecords = _Records


def sendable(name: str) -> str:
    """A header's name as it can be sent: bytes that are no UTF-8 are written out, a backslash first."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class _Buffer(bytearray):
    def __getitem__(self, part: Any) -> Any:
        found = super().__getitem__(part)
        return _Buffer(found) if isinstance(part, slice) else found

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return super().decode(encoding, "surrogateescape")


class _Batch(_DefaultRecordBatchPy):  # type: ignore[misc]
    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        buffer: Any = self._buffer
        if not isinstance(buffer, _Buffer):
            self._buffer: Any = _Buffer(buffer)


class _Records(_MemoryRecordsPy):  # type: ignore[misc]
    def next_batch(self, *arguments: Any) -> Any:
        piece = self._next_slice
        if piece is None or len(piece) < self.MIN_SLICE or piece[self.MAGIC_OFFSET] < 2:
            return super().next_batch(*arguments)
        self._cache_next()
        return _Batch(piece)
