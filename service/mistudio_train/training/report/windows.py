"""The rows around places where features are active, and how active the feature is on each of them.

Owns the cutting at texts' ends and that no two windows of a feature overlap; knows no token and no words.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mistudio_train.training.tokens import RowIndex

from .entries import Entries
from .places import Ints, Place

BEFORE: Final = 12
AFTER: Final = 5
"""Tokens around the place; more before it, since a causal model has seen no other."""


@dataclass(frozen=True)
class Windows:
    """An entry a window, those of a feature together, the strongest first, then those of ever weaker bands."""

    places: Place
    text: Ints
    start: Ints
    """First row."""
    stop: Ints
    """One beyond the last row."""
    strengths: NDArray[np.float32]
    """[windows, rows at most]: of the feature on each row, 0 behind `stop`."""

    def __len__(self) -> int:
        return len(self.text)


def windows_around(places: Place, index: RowIndex, *, whole_texts: bool) -> Windows:
    """Cut at the ends of texts; of two that overlap the weaker place's is left out.

    Args:
        places: as `Places.found` gives them.
        index: which text each row is of.
        whole_texts: rows are texts, and have no neighbours.

    """
    before, after = (0, 0) if whole_texts else (BEFORE, AFTER)
    text = np.array([int(index.text_of_row.read(row, row + 1)[0]) for row in places.row.tolist()], np.int64)
    bounds = np.array([index.starts.read(one, one + 2) for one in text.tolist()], np.int64).reshape(-1, 2)
    start = np.maximum(bounds[:, 0], places.row - before)
    stop = np.minimum(bounds[:, 1], places.row + after + 1)
    kept = _apart(places.feature, start, stop)
    nothing = np.zeros((len(kept), before + after + 1), np.float32)
    return Windows(places.where(kept), text[kept], start[kept], stop[kept], nothing)


def fill(windows: Windows, entries: Iterable[Entries], index: RowIndex) -> None:
    """Note every strength, in one pass over all entries."""
    order = np.lexsort((windows.start, windows.places.feature))
    total = len(index.text_of_row)
    begins = windows.places.feature[order] * total + windows.start[order]
    for some in entries:
        if not len(order):
            return
        row = rows_of(some, index)
        at = np.searchsorted(begins, some.feature * total + row, side="right") - 1
        window = order[np.maximum(at, 0)]
        mine = (at >= 0) & (windows.places.feature[window] == some.feature) & (row < windows.stop[window])
        window, row = window[mine], row[mine]
        windows.strengths[window, row - windows.start[window]] = some.activation[mine]


def rows_of(entries: Entries, index: RowIndex) -> Ints:
    """The row of each entry."""
    if not len(entries):
        return np.zeros(0, np.int64)
    first = int(entries.text[0])
    starts = index.starts.read(first, int(entries.text[-1]) + 1)
    rows: Ints = starts[entries.text - first] + entries.position
    return rows


def _apart(feature: Ints, start: Ints, stop: Ints) -> Ints:
    """Which windows to keep, ascending; of a pair the earlier one, as the places are in the order of their worth."""
    kept = np.lexsort((start, feature))
    while True:
        overlap = (np.diff(feature[kept]) == 0) & (start[kept][1:] < stop[kept][:-1])
        if not overlap.any():
            return np.sort(kept)
        pairs = np.flatnonzero(overlap)
        kept = np.delete(kept, np.unique(pairs + (kept[pairs] < kept[pairs + 1])))
