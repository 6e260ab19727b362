"""Which rows of a site, or of two, are trained on, which are held out, and which are left out of both.

Held out are whole texts, so that no neighbour of a row that is judged was trained on. Left out are attention sinks:
rows of a norm so large that they would be most of what the SAE learns. Reads norms and decides; changes no row.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mistudio_schemas import RowsInfo, TrainRequested

from .activations import ActivationStore
from .disk import ArrayFile, ArrayWriter
from .order import RowOrder
from .texts import Texts
from .tokens import Tokens

HELD_OUT: Final = 1
FIRST_TOKEN: Final = 2
HIGH_NORM: Final = 4
"""What a row is, as bits of its byte in the file."""
OUTLIER: Final = FIRST_TOKEN | HIGH_NORM
REASONS: Final = {"first_token": FIRST_TOKEN, "high_norm": HIGH_NORM}
ROWS_AT_ONCE: Final = 4096
MEDIAN_SAMPLE: Final = 1 << 16
"""Rows whose norms' median stands for that of all."""
FEW_TEXTS: Final = 10_000
"""Of fewer texts as many are held out as the share says; of more, those whose hash is below it, which is as good."""
MOST_LEFT_OUT: Final = 0.5
"""Where more rows than this share would be left out they are ordinary here, and none is."""


class Labels(Protocol):
    """A number for each row."""

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        """Of these rows."""
        ...


@dataclass(frozen=True)
class Selection:
    """What each row of a site is."""

    flags: ArrayFile
    """uint8 [rows]: bits `HELD_OUT`, `FIRST_TOKEN`, `HIGH_NORM`."""
    left_out: int
    """The bits of rows that no SAE is trained on nor judged by."""
    counts: RowsInfo
    mean_D: Tensor | None = None  # noqa: N815
    """Of the training rows of what is reconstructed, fp32 [d_in]; `None` where a row is a whole text."""

    def training(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Which of the rows `start` to `stop` are trained on."""
        mine: NDArray[np.bool_] = self.flags.read(start, stop) & (HELD_OUT | self.left_out) == 0
        return mine

    def training_per_block(self, rows_per_block: int) -> NDArray[np.int64]:
        """How many rows of each block of so many are trained on; the last block may be smaller."""
        counts = []
        together = max(1, (1 << 20) // rows_per_block) * rows_per_block
        for start in range(0, len(self.flags), together):
            mine = self.training(start, min(start + together, len(self.flags)))
            counts.append(np.add.reduceat(mine, np.arange(0, len(mine), rows_per_block), dtype=np.int64))
        return np.concatenate(counts)

    def held_out_rows(self, limit: int) -> NDArray[np.int64]:
        """Numbers of held-out rows that are not left out, ascending; at most `limit`, evenly spread."""
        numbers = []
        for start in range(0, len(self.flags), 1 << 20):
            flags = self.flags.read(start, min(start + (1 << 20), len(self.flags)))
            kept = (flags & HELD_OUT != 0) & (flags & self.left_out == 0)
            numbers.append(start + np.flatnonzero(kept))
        rows = np.concatenate(numbers)
        return rows if len(rows) <= limit else rows[np.arange(limit) * len(rows) // limit]


def hold_out(texts: Texts, tokens: Tokens, share: float) -> NDArray[np.bool_]:
    """Which texts are held out: bool [texts].

    By a hash of the text, so that the same text is on the same side wherever it stands, and twins are together. A text
    of more rows than twice the share is never held out; it would leave too few to train on.

    Args:
        texts: those that have rows.
        tokens: how many rows each has.
        share: of the rows, about; at least one text where there are two.
    """
    count = tokens.corpus.texts
    if not share or count < 2:
        return np.zeros(count, bool)
    places = np.fromiter((place_of(text) for text in texts), np.float64, count)
    if count >= FEW_TEXTS:
        return places < share
    rows_of_text = np.diff(tokens.index.starts.read(0, count + 1))
    wanted, held_out, taken = share * tokens.corpus.rows, np.zeros(count, bool), 0
    for place in np.unique(places):
        twins = places == place
        rows = int(rows_of_text[twins].sum())
        if taken >= wanted:
            break
        if taken + rows <= max(2 * wanted, tokens.corpus.rows / count) and held_out.sum() + twins.sum() < count:
            held_out |= twins
            taken += rows
    return held_out


def select(
    stores: Sequence[ActivationStore],
    tokens: Tokens,
    held_out_texts: NDArray[np.bool_],
    request: TrainRequested,
    path: Path,
    on_progress: Callable[[float], None],
) -> Selection:
    """Say of each row what it is, in a file at `path`.

    Args:
        stores: the rows of what is read, and after them of what is reconstructed if that is another site. A norm counts
            as high if it is at any of them.
        tokens: how they came about.
        held_out_texts: of `hold_out`.
        request: says what is left out.
        path: of the file of flags.
        on_progress: told the share that is done.
    """
    token_rows = request.pooling == "token"
    medians = [_median_norm(store) if token_rows else None for store in stores]
    store = stores[-1]
    first_tokens = _first_tokens(tokens) if token_rows else np.empty(0, np.int64)
    counts = dict.fromkeys(range(8), 0)
    sums = torch.zeros(8, store.d_in, dtype=torch.float64)
    with ArrayWriter(path, np.uint8) as writer:
        for start in range(0, store.rows, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, store.rows)
            flags = held_out_texts[store.text_of_row[start:stop]].astype(np.uint8) * HELD_OUT
            first, last = np.searchsorted(first_tokens, (start, stop))
            flags[first_tokens[first:last] - start] |= FIRST_TOKEN
            if token_rows:
                for one, median in zip(stores, medians, strict=True):
                    rows_ND = one.read(start, stop)
                    flags |= (_norms(rows_ND) > request.high_norm_ratio * (median or 0)).astype(np.uint8) * HIGH_NORM
                sums.index_add_(0, torch.from_numpy(flags.astype(np.int64)), rows_ND.double())
            writer.append(flags)
            for kind, number in enumerate(np.bincount(flags, minlength=8).tolist()):
                counts[kind] += number
            on_progress(stop / store.rows)
    left_out = sum(REASONS[reason] for reason in request.left_out) if token_rows else 0
    info = _counted(counts, left_out, medians[-1])
    if info.left_out > MOST_LEFT_OUT * store.rows or not info.training:
        left_out, info = 0, _counted(counts, 0, medians[-1])
    trained_on = [bits for bits in counts if not bits & (HELD_OUT | left_out)]
    mean_D = (sums[trained_on].sum(0) / max(1, info.training)).float() if token_rows else None
    return Selection(ArrayFile(path, np.uint8), left_out, info, mean_D)


def _counted(counts: dict[int, int], left_out: int, median: float | None) -> RowsInfo:
    def number(wanted: int, *, without: int = 0) -> int:
        return sum(rows for bits, rows in counts.items() if bits & wanted == wanted and not bits & without)

    total = sum(counts.values())
    return RowsInfo(
        total=total,
        training=number(0, without=HELD_OUT | left_out),
        held_out=number(HELD_OUT, without=left_out),
        left_out=total - number(0, without=left_out),
        first_token=number(FIRST_TOKEN),
        high_norm=number(HIGH_NORM, without=FIRST_TOKEN),
        median_norm=median,
    )


def place_of(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


def _first_tokens(tokens: Tokens) -> NDArray[np.int64]:
    """Rows that are the first token that the model sees: ascending; none where a special one comes before them."""
    windows = tokens.windows.read(0, len(tokens.windows))
    rows: NDArray[np.int64] = windows["row"][windows["leads"]].astype(np.int64)
    return rows


def _median_norm(store: ActivationStore) -> float:
    """Of a sample of rows from everywhere."""
    rows = RowOrder(store.rows, (0,)).at(0, MEDIAN_SAMPLE)
    return float(np.median(_norms_of(store, np.sort(rows))))


def _norms_of(store: ActivationStore, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    parts = [_norms(store.gather(rows[at : at + ROWS_AT_ONCE])) for at in range(0, len(rows), ROWS_AT_ONCE)]
    return np.concatenate(parts)


def _norms(rows_ND: Tensor) -> NDArray[np.float32]:
    norms: NDArray[np.float32] = torch.linalg.vector_norm(rows_ND, dim=1).numpy()
    return norms
