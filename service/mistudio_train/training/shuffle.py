"""The rows that an SAE is trained on, in another order every epoch, through a buffer of bounded size.

The rows of several sites lie side by side in one: a transcoder's, what it reads and then what it reconstructs.

Blocks of a few neighbouring rows come in a random order; as many as the buffer holds are mixed row by row. A batch
thus has rows of texts from everywhere, the disk is read in pieces that are worth it, and any place of the order can
be gone to without what lies before it. Reads ahead on threads; the order does not depend on them.
"""

import itertools
from collections.abc import Generator
from contextlib import closing
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .activations import ActivationStore
from .ahead import ahead
from .order import RowOrder
from .selection import Selection

BLOCK_BYTES: Final = 32 * 1024
"""Of neighbouring rows that stay in one buffer: fewer bytes a read make a disk slow."""
BATCHES_AHEAD: Final = 2
CHUNKS_AHEAD: Final = 1
"""While the rows of one buffer are trained on, the next is filled."""

Rows = NDArray[Any]
"""Each item the bytes of a row."""


class ShuffledRows:
    """The training rows of a store, or of several of the same rows.

    Args:
        stores: one a site, of rows of the same numbers, type and width.
        selection: which of the rows to train on.
        seed: with the epoch's number it fixes the order.
        buffer_bytes: of one buffer; two are held, or the whole of rows that fit into one.

    """

    def __init__(self, *stores: ActivationStore, selection: Selection, seed: int, buffer_bytes: int) -> None:
        self._stores, self._selection, self._seed = stores, selection, seed
        self._layout = stores[0].layout
        row_bytes = self._row.itemsize
        self._block_rows = max(1, BLOCK_BYTES // self._layout.row_bytes)
        self._blocks = -(-self._layout.rows // self._block_rows)
        self._blocks_a_chunk = max(1, buffer_bytes // (self._block_rows * row_bytes))
        self._rows_of_block = selection.training_per_block(self._block_rows)
        self._whole: Rows | None = None
        held = 0 if self._blocks <= self._blocks_a_chunk else self._blocks_a_chunk * self._block_rows
        self._buffers = itertools.cycle([self._empty(held) for _ in range(1 + CHUNKS_AHEAD)])
        """Filled in turns: when the next chunk but one is read, this one has been used up."""

    @property
    def rows(self) -> int:
        """How many are trained on."""
        return self._selection.counts.training

    @property
    def d_in(self) -> int:
        """Width of a site's row."""
        return self._layout.d_in

    def sample(self, count: int) -> Tensor:
        """The first rows of the first epoch, in the store's precision; fewer if the buffer holds fewer."""
        number, _, chunk = next(self._chunks(0, 0))
        return self._tensor(chunk[np.sort(RowOrder(len(chunk), (self._seed, 0, number)).at(0, count))])

    def batches(self, epoch: int, size: int, start: int = 0) -> Generator[Tensor]:
        """The epoch's rows from the place `start` on, `size` at a time: [B, sites · d_in], in the stores' precision.

        The last batch may be smaller. A batch is gone when the next one is asked for: its memory is used again. Close
        the generator if it is not used up.
        """
        return ahead(self._batches(epoch, size, start), BATCHES_AHEAD)

    def _batches(self, epoch: int, size: int, start: int) -> Generator[Tensor]:
        size = min(size, self.rows)
        # Fresh memory for each, made on one thread and freed on another, piles up by some tens of megabytes.
        buffers = itertools.cycle([self._empty(size) for _ in range(1 + BATCHES_AHEAD)])
        batch, filled = next(buffers), 0
        with closing(self._pieces(epoch, size, start)) as pieces:
            for chunk, places in pieces:
                room = size - filled
                for part in (places[:room], places[room:]):
                    np.take(chunk, part, out=batch[filled : filled + len(part)], mode="clip")  # `raise` copies twice
                    filled += len(part)
                    if filled == size:
                        yield self._tensor(batch)
                        batch, filled = next(buffers), 0
        if filled:
            yield self._tensor(batch[:filled])

    def _pieces(self, epoch: int, size: int, start: int) -> Generator[tuple[Rows, NDArray[np.int64]]]:
        """Where the rows are from the place `start` on, in their order, at most `size` at a time: chunks and places."""
        with closing(ahead(self._chunks(epoch, start), CHUNKS_AHEAD)) as chunks:
            for number, skipped, chunk in chunks:
                order = RowOrder(len(chunk), (self._seed, epoch, number))
                yield from ((chunk, places) for places in order.batches(size, skipped))

    def _chunks(self, epoch: int, start: int) -> Generator[tuple[int, int, Rows]]:
        """Each chunk's number, how many of its rows come before the place `start`, and its rows, if not all do."""
        blocks_of_epoch = RowOrder(self._blocks, (self._seed, epoch))
        before = 0
        for number, blocks in enumerate(blocks_of_epoch.batches(self._blocks_a_chunk)):
            rows = int(self._rows_of_block[blocks].sum(dtype=np.int64))
            if before + rows > start:
                yield number, max(0, start - before), self._chunk(blocks)
            before += rows

    def _chunk(self, blocks: NDArray[np.int64]) -> Rows:
        """The training rows of these blocks in the store's order; where there is but one chunk, it is read but once."""
        if self._whole is not None:
            return self._whole
        if self._blocks <= self._blocks_a_chunk:
            self._whole = self._read(np.sort(blocks), self._empty(self.rows))
            return self._whole
        return self._read(np.sort(blocks), next(self._buffers))

    def _read(self, blocks: NDArray[np.int64], rows: Rows) -> Rows:
        """Fill the beginning of `rows` with the training rows of these blocks."""
        block, filled = np.empty(self._block_rows, (np.void, self._layout.row_bytes)), 0
        for start in (blocks * self._block_rows).tolist():
            stop = min(start + self._block_rows, self._layout.rows)
            training = self._selection.training(start, stop)
            count = int(training.sum())
            for store, site in zip(self._stores, self._sites, strict=True):
                store.read_into(block[: stop - start].view(np.uint8).data, start, stop)
                rows[site][filled : filled + count] = block[: stop - start][training]
            filled += count
        return rows[:filled]

    def _empty(self, rows: int) -> Rows:
        return np.empty(rows, self._row)

    @property
    def _sites(self) -> list[str]:
        return [str(number) for number in range(len(self._stores))]

    @property
    def _row(self) -> np.dtype[np.void]:
        return np.dtype([(site, (np.void, self._layout.row_bytes)) for site in self._sites])

    def _tensor(self, rows: Rows) -> Tensor:
        flat = torch.from_numpy(rows.view(np.uint8))
        return flat.view(self._layout.dtype).view(len(rows), len(self._stores) * self.d_in)
