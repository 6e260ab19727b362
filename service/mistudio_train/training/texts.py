"""The texts of a corpus on the scratch disk, one after another, with where each begins.

Owns that pair of files; knows no corpus format, no tokenizer and no torch.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .disk import ArrayFile, ArrayWriter
from .labels import Labels

READ_AHEAD = 64
READ_AHEAD_BYTES = 4 * 1024**2
"""Texts, and about so many bytes of them, that are read at once when all are wanted in order; one at least."""


@dataclass(frozen=True)
class Dropped:
    """How many texts of a corpus are not used, by reason."""

    empty: int = 0
    too_short: int = 0
    too_long: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.empty + self.too_short + self.too_long


class TextsWriter:
    """Appends texts; what was written is read by `Texts`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._bytes = ArrayWriter(folder / "texts.bin", np.uint8)
        self._starts = ArrayWriter(folder / "texts.idx", np.int64)
        self._starts.append(0)
        self._end = 0
        self.count = 0

    def append(self, text: str) -> None:
        """Write one text.

        Raises:
            UnicodeEncodeError: if it holds half a surrogate pair, which no UTF-8 can.

        """
        encoded = text.encode()
        self._bytes.append(np.frombuffer(encoded, np.uint8))
        self._end += len(encoded)
        self._starts.append(self._end)
        self.count += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bytes.__exit__(kind, error, trace)
        self._starts.__exit__(kind, error, trace)


class Texts:
    """A sequence of texts of which none is in memory: `texts[i]` reads the i-th."""

    def __init__(
        self, folder: Path, *, dropped: Dropped = Dropped(), sha256: str = "0" * 64, labels: Labels | None = None
    ) -> None:
        self._bytes = ArrayFile(folder / "texts.bin", np.uint8)
        self._starts = ArrayFile(folder / "texts.idx", np.int64)
        self.dropped = dropped
        """Texts of the corpus that are not among these."""
        self.sha256 = sha256
        """Of the corpus file, as it was given."""
        self.labels = labels
        """Where the request names a column of them."""

        self._count = len(self._starts) - 1

    @property
    def bytes(self) -> int:
        """Of all of them, in UTF-8."""
        return int(self._starts.read(self._count, self._count + 1)[0])

    def first(self, count: int) -> "Texts":
        """The first `count` of them, as a view."""
        view = copy.copy(self)
        view._count = min(count, self._count)
        return view

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> str:
        """The i-th text.

        Raises:
            IndexError: if there are not so many.

        """
        if not 0 <= i < len(self):
            raise IndexError(f"text {i} of {len(self)}")
        return self.read(i, i + 1)[0]

    def __iter__(self) -> Iterator[str]:
        start = 0
        while start < len(self):
            starts = self._starts.read(start, min(start + READ_AHEAD, len(self)) + 1)
            count = max(1, int(np.searchsorted(starts, starts[0] + READ_AHEAD_BYTES, side="right")) - 1)
            yield from self._between(starts[: count + 1])
            start += count

    def read(self, start: int, stop: int) -> list[str]:
        """The texts `start` to `stop`."""
        return self._between(self._starts.read(start, stop + 1))

    def _between(self, starts: NDArray[np.int64]) -> list[str]:
        """The texts that begin at each of `starts` but the last, where the last of them ends."""
        joined = self._bytes.read_bytes(int(starts[0]), int(starts[-1]))
        bounds = starts - starts[0]
        return [joined[a:b].decode() for a, b in pairwise(bounds)]
