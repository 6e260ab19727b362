"""What the page shows of each feature, a record each.

Owns the records' fields; the words in them are safe before they come in (`shown`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mistudio_train.training.promoted import Promoted

from .neighbours import Neighbours
from .packs import Card
from .shown import Vocabulary, shown
from .windows import Windows

STRENGTHS: Final = 99
"""A token's strength is a whole number from 0 to this, of the feature's maximum."""


@dataclass(frozen=True)
class Sources:
    """What cards are made of; the first three are arrays of every feature, [d_sae]."""

    rates: NDArray[np.float64]
    """Share of the rows that it is active on."""
    maxima: NDArray[np.float64]
    histograms: NDArray[np.int64]
    windows: Windows
    pieces: Callable[[int, int], list[str]]
    """The tokens of rows `start` to `stop` as text, one a row; of whole texts these. Not yet safe to show."""
    piece_most: int
    """Characters of a piece that are shown."""
    bounds: Callable[[int], slice]
    """The rows of a text."""
    neighbours: Neighbours
    promoted: Promoted | None
    vocabulary: Vocabulary

    def windows_of(self, feature: int) -> range:
        """Numbers of the feature's windows, which are ordered by feature."""
        return range(*np.searchsorted(self.windows.places.feature, (feature, feature + 1)).tolist())


def card(sources: Sources, feature: int) -> Card:
    """One feature.

    Returns:
        `n` its number; `r` the share of rows it is active on; `m` its maximum; `h` its histogram from 0 to that; `w`
        the words it is strongest on; `c` contexts, each with its text's number `t`, its activation `a`, its band `b`,
        its pieces `p`, their strengths `s`, and `o`: 1 if the text goes on before, 2 behind, 3 both; `x` the nearest
        features with cosines; `u` and `d` the tokens that it promotes and suppresses.

    """
    contexts = [_context(sources, number) for number in sources.windows_of(feature)]
    found: Card = {
        "n": feature,
        "r": round(float(sources.rates[feature]), 8),
        "m": round(float(sources.maxima[feature]), 4),
        "h": sources.histograms[feature].tolist(),
        "w": _peaks(contexts),
        "c": contexts,
        "x": _nearest(sources.neighbours, feature),
    }
    if sources.promoted is not None:
        found |= _speaks_for(sources.promoted, sources.vocabulary, feature)
    return found


def _context(sources: Sources, number: int) -> Card:
    windows = sources.windows
    start, stop = int(windows.start[number]), int(windows.stop[number])
    highest = max(float(sources.maxima[windows.places.feature[number]]), 1e-30)
    strengths = windows.strengths[number, : stop - start] / highest * STRENGTHS
    text = sources.bounds(int(windows.text[number]))
    return {
        "t": int(windows.text[number]),
        "a": round(float(windows.places.activation[number]), 4),
        "b": int(windows.places.band[number]),
        "o": int(text.start < start) + 2 * int(stop < text.stop),
        "p": [shown(piece, sources.piece_most) for piece in sources.pieces(start, stop)],
        "s": np.clip(np.ceil(strengths), 0, STRENGTHS).astype(int).tolist(),
    }


def _peaks(contexts: Sequence[Card]) -> list[str]:
    """The strongest word of each context that is among the strongest, each once, the most frequent first."""
    counts: dict[str, int] = {}
    for one in contexts:
        if one["b"] == 0 and len(one["p"]) > 1:
            word = one["p"][max(range(len(one["s"])), key=one["s"].__getitem__)].strip()
            counts[word] = counts.get(word, 0) + 1
    return sorted(counts, key=lambda word: -counts[word])[:5]


def _nearest(found: Neighbours, feature: int) -> list[tuple[int, float]]:
    at = int(np.searchsorted(found.feature, feature))
    if at >= len(found.feature) or found.feature[at] != feature:
        return []
    pairs = zip(found.nearest[at].tolist(), found.cosine[at].tolist(), strict=True)
    return [(number, round(cosine, 3)) for number, cosine in pairs]


def _speaks_for(promoted: Promoted, vocabulary: Vocabulary, feature: int) -> Card:
    def listed(tokens: NDArray[np.int32], logits: NDArray[np.float32]) -> list[tuple[str, float]]:
        pairs = zip(tokens[feature].tolist(), logits[feature].tolist(), strict=True)
        return [(vocabulary.shown(token), round(logit, 2)) for token, logit in pairs]

    return {
        "u": listed(promoted.most, promoted.most_logits),
        "d": listed(promoted.least, promoted.least_logits),
    }
