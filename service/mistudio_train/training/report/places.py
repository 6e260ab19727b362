"""Where features are active, found in one pass over all entries at a memory that only features cost.

Of each feature: how its activations spread, the places where it is strongest, and some from every weaker band, chosen
by a hash so that the same run gives the same page. Reads no file, knows no text.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

WEAKER_BANDS: Final = 4
"""Below a fifth of the maximum, below two fifths, and so on; the strongest places have the rest."""
BANDS: Final = WEAKER_BANDS + 1
BINS: Final = 5 * BANDS
"""Of a feature's histogram, from 0 to its maximum."""
NO_KEY: Final = np.iinfo(np.uint64).max

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Place:
    """Where some features are active, an entry a place; a feature's are together, the strongest first."""

    feature: Ints
    row: Ints
    activation: NDArray[np.float32]
    band: Ints
    """0: among the strongest; else 1, 2, … for ever weaker bands."""

    def __len__(self) -> int:
        return len(self.feature)

    def where(self, chosen: NDArray[np.bool_] | Ints) -> "Place":
        """Some of them."""
        return Place(self.feature[chosen], self.row[chosen], self.activation[chosen], self.band[chosen])


class Places:
    """What is known of all features by now.

    Args:
        max_F: each feature's largest activation over all entries that will be added.
        strongest: places of a feature to keep, one a group of rows.
        weaker: places of each weaker band to keep.

    """

    def __init__(self, max_F: NDArray[np.float64], strongest: int, weaker: int) -> None:
        self.d_sae = len(max_F)
        self.histogram_FB = np.zeros((self.d_sae, BINS), np.int64)
        """How many of a feature's activations are in each bin."""
        self._scale_F = 1 / np.where(max_F > 0, max_F, np.inf)
        self._strongest, self._weaker = strongest, weaker
        self._top = _Top(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
        self._least_F = np.zeros(self.d_sae, np.float32)
        shape = (weaker, self.d_sae * WEAKER_BANDS)
        self._key = np.full(shape, NO_KEY, np.uint64)
        self._row, self._activation = np.zeros(shape, np.int64), np.zeros(shape, np.float32)

    def add(self, feature: Ints, row: Ints, group: Ints, activation: NDArray[np.float32]) -> None:
        """Entries that come after those before.

        Args:
            feature: of each entry.
            row: its row's number.
            group: of which a feature is shown at its strongest place only: a text, say.
            activation: above 0.

        """
        share = activation * self._scale_F[feature]
        bins = np.minimum((share * BINS).astype(np.int64), BINS - 1)
        counts = np.bincount(feature * BINS + bins, minlength=self.d_sae * BINS)
        self.histogram_FB += counts.reshape(self.d_sae, BINS)
        self._keep_strongest(_Top(feature, group, row, activation))
        self._keep_weaker(feature, row, activation, np.minimum((share * BANDS).astype(np.int64), BANDS - 1))

    def found(self) -> Place:
        """The places that were kept, the strongest of a feature before those of weaker bands."""
        top = self._top
        parts = [Place(top.feature, top.row, top.activation, np.zeros(len(top.feature), np.int64))]
        for draw in range(self._weaker):
            at = np.flatnonzero(self._key[draw] != NO_KEY)
            feature, band = at // WEAKER_BANDS, WEAKER_BANDS - at % WEAKER_BANDS
            parts.append(Place(feature, self._row[draw, at], self._activation[draw, at], band))
        together = Place(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in Place.__dataclass_fields__)
        )
        return together.where(np.lexsort((-together.activation, together.band, together.feature)))

    def _keep_strongest(self, new: "_Top") -> None:
        """Those that are stronger than what a feature has so many of already."""
        better = new.where(new.activation > self._least_F[new.feature])
        if not len(better.feature):
            return
        self._top = self._top.joined(better).strongest(self._strongest)
        counts = np.bincount(self._top.feature, minlength=self.d_sae)
        least_F = np.full(self.d_sae, np.inf, np.float32)
        np.minimum.at(least_F, self._top.feature, self._top.activation)
        self._least_F = np.where(counts < self._strongest, np.float32(0), least_F)

    def _keep_weaker(self, feature: Ints, row: Ints, activation: NDArray[np.float32], band: Ints) -> None:
        """In every band those with the least hash: each entry has the same chance."""
        weak = np.flatnonzero(band < WEAKER_BANDS)
        slot, row, activation = feature[weak] * WEAKER_BANDS + band[weak], row[weak], activation[weak]
        for draw in range(self._weaker):
            key = _mixed(row.astype(np.uint64) * np.uint64(self.d_sae) + feature[weak].astype(np.uint64), draw)
            less = np.flatnonzero(key < self._key[draw, slot])
            order = less[np.lexsort((key[less], slot[less]))]
            first = order[np.unique(slot[order], return_index=True)[1]]
            at = slot[first]
            self._key[draw, at] = key[first]
            self._row[draw, at], self._activation[draw, at] = row[first], activation[first]


@dataclass(frozen=True)
class _Top:
    """Places with their groups."""

    feature: Ints
    group: Ints
    row: Ints
    activation: NDArray[np.float32]

    def where(self, chosen: NDArray[np.bool_] | Ints) -> "_Top":
        return _Top(self.feature[chosen], self.group[chosen], self.row[chosen], self.activation[chosen])

    def joined(self, other: "_Top") -> "_Top":
        return _Top(
            *(np.concatenate((getattr(self, name), getattr(other, name))) for name in self.__dataclass_fields__)
        )

    def strongest(self, count: int) -> "_Top":
        """Of each feature the strongest place of each of so many groups; the strongest first."""
        by_group = self.where(np.lexsort((self.row, -self.activation, self.group, self.feature)))
        new = (np.diff(by_group.feature, prepend=-1) != 0) | (np.diff(by_group.group, prepend=-1) != 0)
        one_a_group = by_group.where(new)
        ranked = one_a_group.where(np.lexsort((one_a_group.row, -one_a_group.activation, one_a_group.feature)))
        begins = np.flatnonzero(np.diff(ranked.feature, prepend=-1) != 0)
        rank = np.arange(len(ranked.feature)) - np.repeat(begins, np.diff(begins, append=len(ranked.feature)))
        return ranked.where(rank < count)


def _mixed(numbers: NDArray[np.uint64], draw: int) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit depends on every one."""
    z = numbers + np.uint64(0x9E3779B97F4A7C15 * (draw + 1) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
