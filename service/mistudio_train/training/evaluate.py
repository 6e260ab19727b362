"""What a finished SAE does on every row: its active features, and statistics on the way.

Runs the folded SAE over the stored activations in blocks; writes no file and decides nothing.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mistudio_schemas import CrossEntropy, SAEMetrics
from mistudio_train.sae.folded import FoldedSAE
from mistudio_train.sae.sparse import Active
from mistudio_train.sae.statistics import FeatureStatistics

from .features import RowFeatures
from .selection import HELD_OUT, OUTLIER, Labels

BLOCK_BYTES = 16 * 1024**2
"""Of one block: dense features and, more where there are few features, the rows' fp64 copies in the statistics."""
PLACES_AT_ONCE = 1 << 19
"""Of a matrix with many active features: so many become entries at a time, which take 60 bytes each on their way."""
FP64_COPIES = 4
"""Of the rows and their reconstructions, held at once."""


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


class Targets(Protocol):
    """What a transcoder is to reconstruct of each row."""

    def read(self, start: int, stop: int) -> Tensor:
        """Of rows `start` to `stop`: fp32 [B, d_in]."""
        ...


class Evaluation:
    """One SAE on one site's rows.

    Args:
        flags: what each row is, bits of `selection`.
        left_out: those of rows that the SAE is not judged by.
        device: where the SAE runs.
        on_progress: told the share of the rows that are done.
        targets: the rows to be reconstructed; `None`: those themselves.
    """

    def __init__(
        self,
        sae: FoldedSAE,
        rows: OrderedRows,
        flags: Labels,
        left_out: int,
        device: torch.device,
        on_progress: Callable[[float], None],
        targets: Targets | None = None,
    ) -> None:
        self._sae, self._rows, self._device = sae.to(device), rows, device
        self._targets = targets
        self._flags, self._left_out = flags, left_out
        self._on_progress = on_progress
        self._rows_per_block = max(16, BLOCK_BYTES // (4 * sae.d_sae + 8 * FP64_COPIES * sae.d_in))
        self._by_flags: dict[int, FeatureStatistics] = {}

    def statistics(self) -> FeatureStatistics:
        """Of all rows, once `blocks` is exhausted."""
        return self._of(lambda flags: True)

    def metrics(self, final_loss: float, cross_entropy: CrossEntropy | None = None) -> SAEMetrics:
        """The contract's figures, once `blocks` is exhausted.

        Raises:
            TrainingDiverged: if a row, a reconstruction or an activation was NaN or infinite.
        """
        kept_out = self._of(lambda flags: flags & HELD_OUT and not flags & self._left_out)
        training = self._of(lambda flags: not flags & (HELD_OUT | self._left_out))
        judged_by = HELD_OUT if kept_out.rows else 0
        judged = kept_out if kept_out.rows else training
        ordinary = self._of(lambda flags: flags & HELD_OUT == judged_by and not flags & OUTLIER)
        outliers, everything = self._of(lambda flags: flags & OUTLIER), self.statistics()
        share = (
            outliers.squared_deviation_from(everything.mean_D) / everything.variance if everything.variance else None
        )
        figures = {
            "held_out": judged_by == HELD_OUT,
            "never_active_share": everything.dead / self._sae.d_sae,
            "training_fvu": training.fvu(),
            "fvu_ordinary": ordinary.fvu(),
            "fvu_outliers": outliers.fvu(),
            "outliers_variance_share": share,
            "firing_histogram": everything.firing_histogram(),
            "cross_entropy": cross_entropy,
        }
        return judged.metrics(final_loss).model_copy(update=figures)

    def blocks(self, *, count: bool = True) -> Iterator[tuple[RowFeatures, Tensor]]:
        """The active features of every row, in order, and the rows, both on the CPU; `count` them for the figures.

        Figures of reconstructions are of the targets; the rows are what is read.
        """
        for start, x_BD in self._rows.blocks(self._rows_per_block):
            there_BD = x_BD.to(self._device)
            active, values = self._sae.encode_sparse(there_BD)
            if count:
                if self._targets is not None:
                    there_BD = self._targets.read(start, start + len(x_BD)).to(self._device)
                x_hat_BD = self._sae.decode_sparse(active, values)
                flags_B = _tensor(self._flags[start : start + len(x_BD)])
                self._count(flags_B, there_BD, x_hat_BD, active, values)
            for which, of_part, values_of_part in active.parts(values, PLACES_AT_ONCE):
                yield self._features(start + which.start, of_part, values_of_part), x_BD[which]
            self._on_progress((start + len(x_BD)) / self._rows.rows)

    def _features(self, start: int, active: Active, values: Tensor) -> RowFeatures:
        row_N, feature_N, activation_N = (entries.cpu() for entries in active.entries(values))
        rows = slice(start, start + active.rows)
        return RowFeatures(
            text=_tensor(self._rows.text_of_row[rows]),
            position=_tensor(self._rows.position_of_row[rows]),
            token_id=_tensor(self._rows.token_of_row[rows]),
            row=row_N,
            feature=feature_N,
            activation=activation_N,
        )

    def _of(self, wanted: Callable[[int], object]) -> FeatureStatistics:
        """Of rows of some flags."""
        total = FeatureStatistics(self._sae.d_sae, self._sae.d_in, self._device)
        for flags, statistics in sorted(self._by_flags.items()):
            if wanted(flags):
                total.add(statistics)
        return total

    def _count(self, flags_B: Tensor, x_BD: Tensor, x_hat_BD: Tensor, active: Active, values: Tensor) -> None:
        for flags in sorted(set(flags_B.tolist())):
            if flags not in self._by_flags:
                self._by_flags[flags] = FeatureStatistics(self._sae.d_sae, self._sae.d_in, self._device)
            which_B = (flags_B == flags).to(self._device)
            part, which = active.of_rows(which_B)
            self._by_flags[flags].update_sparse(x_BD[which_B], x_hat_BD[which_B], part, values[which])


def _tensor(labels_B: NDArray[Any]) -> Tensor:
    return torch.from_numpy(labels_B.astype(np.int64))
