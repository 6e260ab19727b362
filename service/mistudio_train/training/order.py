"""A random order of rows that is computed, not stored: billions of rows can be gone through in it at no memory.

Pure arithmetic on row numbers; must not know rows, batches or a trainer.
"""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

ROUNDS: Final = 8
"""Four make a Feistel network a strong permutation of a large domain (Luby and Rackoff 1988); small ones want more."""
LEAST_BITS: Final = 8
"""With fewer the halves are so small that some orders of a handful of rows would come more often than others."""
AT_ONCE: Final = 1 << 16
"""Row numbers that are computed together."""

Numbers = NDArray[np.int64]


class RowOrder:
    """A permutation of `rows` row numbers, given by a key: the same key and number of rows give the same order.

    A Feistel network permutes the numbers of as many bits as the last row needs; a number that comes out too large is
    put through again until it is a row's (cycle walking: Black and Rogaway 2002, "Ciphers with Arbitrary Finite
    Domains"). Of more than a handful of rows at most half of the numbers are too large: two passes in the mean at most.

    Args:
        rows: how many there are, at least 1.
        key: numbers that name the order, none negative.

    """

    def __init__(self, rows: int, key: tuple[int, ...]) -> None:
        self.rows = rows
        bits = max(LEAST_BITS, (rows - 1).bit_length())
        right_bits = bits // 2
        self._right_bits = np.uint64(right_bits)
        self._right_mask = np.uint64((1 << right_bits) - 1)
        self._left_mask = np.uint64((1 << (bits - right_bits)) - 1)
        self._keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)

    def at(self, start: int, stop: int) -> Numbers:
        """The rows at the places `start` to `stop` of the order: int64 [stop - start]."""
        numbers = self._permuted(np.arange(start, min(stop, self.rows), dtype=np.uint64))
        while len(outside := np.flatnonzero(numbers >= self.rows)):
            numbers[outside] = self._permuted(numbers[outside])
        return numbers.astype(np.int64)

    def batches(self, size: int, start: int = 0) -> Iterator[Numbers]:
        """The rows from the place `start` on, `size` at a time; the last batch may be smaller."""
        together = max(1, AT_ONCE // size) * size
        for begin in range(start, self.rows, together):
            numbers = self.at(begin, begin + together)
            yield from (numbers[at : at + size] for at in range(0, len(numbers), size))

    def _permuted(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = numbers >> self._right_bits, numbers & self._right_mask
        for place, key in enumerate(self._keys):
            if place % 2:
                right = right ^ (_mixed(left, key) & self._right_mask)
            else:
                left = left ^ (_mixed(right, key) & self._left_mask)
        return (left << self._right_bits) | right


def _mixed(numbers: NDArray[np.uint64], key: Any) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014), which wraps around as it should."""
    mixed: NDArray[np.uint64] = numbers + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
