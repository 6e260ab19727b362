"""Every active feature of every row of a finished run, some hundred thousand at a time, out of the run's own files.

Owns where they are read from: the sparse store, or of whole texts the bundle; must not know what they are read for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

STORE: Final = Path("features") / "activations.parquet"
BUNDLE: Final = "feature_activations.pt"
ROWS_AT_ONCE: Final = 1 << 18
"""Entries of the store, or places of the bundle's matrix."""


@dataclass(frozen=True)
class Entries:
    """Some active features, ordered by text, position and feature."""

    text: NDArray[np.int64]
    """Which text, from 0."""
    position: NDArray[np.int64]
    """Which of the text's tokens; 0 where a row is a whole text."""
    feature: NDArray[np.int64]
    activation: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.feature)


def entries_of(folder: Path) -> Iterator[Entries]:
    """All of them, in order; a text has its entries together.

    Args:
        folder: of one SAE's files.

    Raises:
        FileNotFoundError: if it has neither store nor bundle.

    """
    return _of_store(folder / STORE) if (folder / STORE).exists() else _of_bundle(folder / BUNDLE)


def _of_store(path: Path) -> Iterator[Entries]:
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["text", "position", "feature", "activation"])
            text, position, feature = (
                table[name].to_numpy().astype(np.int64) for name in ("text", "position", "feature")
            )
            yield Entries(text, np.maximum(position, 0), feature, table["activation"].to_numpy())


def _of_bundle(path: Path) -> Iterator[Entries]:
    acts_NF = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["feature_activations"]
    rows = max(1, ROWS_AT_ONCE // acts_NF.shape[1])
    for first in range(0, len(acts_NF), rows):
        part = acts_NF[first : first + rows].numpy()
        text, feature = np.nonzero(part)
        yield Entries(text + first, np.zeros_like(text), feature, part[text, feature])
