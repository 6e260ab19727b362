"""What a finished SAE does on every row: one row a text for the bundle, statistics on the way, sparse features.

Runs the folded SAE over the stored activations in blocks; writes no file and decides nothing.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mistudio_train.sae.folded import FoldedSAE
from mistudio_train.sae.statistics import FeatureStatistics

from .bundle import Block
from .features import TokenFeatures
from .text_rows import one_row_a_text

BLOCK_BYTES = 8 * 1024**2
"""Of one block: dense features and, more where there are few features, the rows' fp64 copies in the statistics."""
FP64_COPIES = 4
"""Of the rows and their reconstructions, held at once."""


class Labels(Protocol):
    """A number for each row, of which some are read at a time."""

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        """Of these rows."""
        ...


class OrderedRows(Protocol):
    """Stored activations in the order of the texts."""

    @property
    def rows(self) -> int:
        """How many there are."""
        ...

    def blocks(self, rows_per_block: int) -> Iterator[tuple[int, Tensor]]:
        """First row's number and the rows, fp32 [B, d_in]."""
        ...

    @property
    def text_of_row(self) -> Labels:
        """int32 [rows]: which text each row is of."""
        ...

    @property
    def position_of_row(self) -> Labels:
        """int32 [rows]: which of its text's tokens; -1 for a whole text."""
        ...

    @property
    def token_of_row(self) -> Labels:
        """int32 [rows]: the token's id; -1 for a whole text."""
        ...


class Evaluation:
    """One SAE on one site's rows.

    Args:
        device: where the SAE runs.
        on_progress: told the share of the rows that are done.
    """

    def __init__(
        self, sae: FoldedSAE, rows: OrderedRows, device: torch.device, on_progress: Callable[[float], None]
    ) -> None:
        self._sae, self._rows, self._device = sae.to(device), rows, device
        self._on_progress = on_progress
        self._rows_per_block = max(16, BLOCK_BYTES // (4 * sae.d_sae + 8 * FP64_COPIES * sae.d_in))
        self.statistics = FeatureStatistics(sae.d_sae, sae.d_in, device)

    def text_blocks(self, texts: int, *, mean_pooled: bool) -> Iterator[Block]:
        """Features and activations, one row a text, on the CPU. Complete only when it is exhausted."""
        if mean_pooled:
            return ((acts_BF, x_BD) for acts_BF, x_BD, _ in self._dense_blocks())
        return one_row_a_text(self._dense_blocks(), texts)

    def sparse_blocks(self) -> Iterator[TokenFeatures]:
        """The active features of every row, in order."""
        for start, x_BD in self._rows.blocks(self._rows_per_block):
            values_BK, indices_BK = self._sae.encode_sparse(x_BD.to(self._device))
            rows = slice(start, start + len(x_BD))
            yield TokenFeatures(
                text=_tensor(self._rows.text_of_row[rows]),
                position=_tensor(self._rows.position_of_row[rows]),
                token_id=_tensor(self._rows.token_of_row[rows]),
                values=values_BK.cpu(),
                indices=indices_BK.cpu(),
            )
            self._on_progress((start + len(x_BD)) / self._rows.rows)

    def _dense_blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for start, x_BD in self._rows.blocks(self._rows_per_block):
            there_BD = x_BD.to(self._device)
            acts_BF = self._sae.encode(there_BD)
            self.statistics.update(there_BD, self._sae.decode(acts_BF), acts_BF)
            yield acts_BF.cpu(), x_BD, _tensor(self._rows.text_of_row[start : start + len(x_BD)])
            self._on_progress((start + len(x_BD)) / self._rows.rows)


def _tensor(labels_B: NDArray[Any]) -> Tensor:
    return torch.from_numpy(labels_B.astype(np.int64))
