"""What the page and the exports show of features: which ones, where they are active and what is around there.

Owns the choice and the passes over a run's files, which are made once; must not know in which form they are shown.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from mistudio_train.sae.folded import FoldedSAE
from mistudio_train.training.promoted import Promoted

from .cards import Sources
from .entries import Entries, entries_of
from .material import Material
from .neighbours import neighbours
from .places import Places
from .shown import PIECE_MOST, TEXT_MOST, Vocabulary
from .windows import Windows, fill, rows_of, windows_around

CARDS_MOST: Final = 16_384
"""Features with a card: those that are strongest, if there are more."""
MANY: Final = 4096
"""From so many on each has fewer contexts."""
GROUP_ROWS: Final = 64
"""Where there are few texts a feature is shown once in so many rows, else once a text."""
FEW_TEXTS: Final = 100


@dataclass(frozen=True)
class Gathered:
    """Of one SAE."""

    sources: Sources
    order: NDArray[np.int64]
    """The features that are shown: those that are active anywhere, the strongest first; at most `CARDS_MOST`."""
    living: int
    """How many are active anywhere."""
    sae: FoldedSAE


def gather(
    folder: Path, sae: FoldedSAE, promoted: Promoted | None, material: Material, on_progress: Callable[[], None]
) -> Gathered:
    """Go over the run's files.

    Args:
        folder: of the SAE's files.
        sae: as it was delivered.
        promoted: which tokens its features speak for; `None` where that is not known.
        material: the rest.
        on_progress: called now and then.

    Raises:
        FileNotFoundError: if the folder has neither store nor bundle.

    """
    statistics = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["feature_statistics"]
    rate_F, max_F = (
        np.array(statistics[f"feature_{name}"], np.float64) for name in ("activation_rates", "max_activations")
    )
    order, living = _strongest_first(sae, max_F), np.flatnonzero(max_F > 0)
    near = neighbours(sae.decoder_weight, living, material.device)
    on_progress()
    places, windows = _windows(folder, max_F, order, material, on_progress)
    vocabulary = Vocabulary(material.tokenizer)
    sources = Sources(
        rates=rate_F,
        maxima=max_F,
        histograms=places.histogram_FB,
        windows=windows,
        pieces=partial(_pieces, material, vocabulary),
        piece_most=TEXT_MOST if material.whole_texts else PIECE_MOST,
        bounds=material.index.rows_of_text,
        neighbours=near,
        promoted=promoted,
        vocabulary=vocabulary,
    )
    return Gathered(sources, order, len(living), sae)


def _strongest_first(sae: FoldedSAE, max_F: NDArray[np.float64]) -> NDArray[np.int64]:
    """Features that are active anywhere, by the longest vector that they ever add."""
    norms_F = torch.linalg.vector_norm(sae.decoder_weight, dim=0).double().cpu().numpy()
    living = np.flatnonzero(max_F > 0)
    return living[np.argsort(-(max_F * norms_F)[living], kind="stable")][:CARDS_MOST]


def _windows(
    folder: Path,
    max_F: NDArray[np.float64],
    order: NDArray[np.int64],
    material: Material,
    on_progress: Callable[[], None],
) -> tuple[Places, Windows]:
    """Two passes over all entries: where features are active, and what they do around there."""
    places = Places(max_F, *((8, 2) if len(order) <= MANY else (4, 1)))
    by_text = material.whole_texts or material.corpus.texts >= FEW_TEXTS

    def heard(entries: Iterator[Entries]) -> Iterator[Entries]:
        for some in entries:
            yield some
            on_progress()

    for some in heard(entries_of(folder)):
        row = rows_of(some, material.index)
        places.add(some.feature, row, some.text if by_text else row // GROUP_ROWS, some.activation)
    found = places.found()
    with_card = np.zeros(len(max_F), bool)
    with_card[order] = True
    windows = windows_around(found.where(with_card[found.feature]), material.index, whole_texts=material.whole_texts)
    if not material.whole_texts:
        fill(windows, heard(entries_of(folder)), material.index)
    return places, windows


def _pieces(material: Material, vocabulary: Vocabulary, start: int, stop: int) -> list[str]:
    if material.whole_texts:
        return [material.texts[start]]
    return vocabulary.pieces(material.index.token_of_row.read(start, stop).tolist())
