"""Which entries of a whole matrix are the largest: exactly, and without going through all of them in order.

Owns the choice; must not know what the entries are, nor what becomes of them.
"""

from torch import Tensor

from .sparse import Active

GUESS_BELOW = 0.9
"""Of the last smallest chosen entry; further down there would be more to select from, nearer to it more misses."""
LEAST_GUESS = 1e-6
SAMPLE = 100_003
"""Entries that the first guess is made from."""


class LargestOfBatch:
    """Chooses the largest positive entries of a whole matrix, exactly; fast after a similar matrix.

    A selection from all entries at once is slow, so first those above a guess are gathered, a little below the last
    smallest one; a guess that was too high is lowered. What is chosen does not depend on the guess: among equal ones
    at the border the first stay.
    """

    def __init__(self) -> None:
        self._guess: float | None = None

    def choose(self, matrix_BF: Tensor, count: int) -> tuple[Active, Tensor]:
        """So many places, of a matrix with fewer positive entries all of these; and the smallest entry, or zero.

        On a GPU always so many: those beyond the positive ones are for a ReLU to set to zero.
        """
        flat = matrix_BF.reshape(-1)
        if flat.is_cuda:  # which selects from all at once, and need not be asked for any number on the way
            places_N = flat.topk(count, sorted=False).indices.sort().values
            return Active.at(places_N, *matrix_BF.shape), flat[places_N].min().clamp_min(0)
        places_N = self._candidates(flat, count)
        values_N = flat[places_N]
        if not len(values_N):
            self._guess = 0.0
            return Active.at(places_N, *matrix_BF.shape), flat.new_zeros(())
        # to `kthvalue`, what is no number is the largest
        smallest = values_N.kthvalue(max(1, len(values_N) - count + 1)).values
        if len(places_N) > count:
            above_N, equal_N = ~(values_N <= smallest), values_N == smallest
            places_N = places_N[above_N | (equal_N & (equal_N.cumsum(0) <= count - above_N.sum()))]
        self._guess = GUESS_BELOW * float(smallest)
        return Active.at(places_N, *matrix_BF.shape), smallest

    def _candidates(self, flat: Tensor, count: int) -> Tensor:
        guess = self._guess if self._guess is not None else self._first_guess(flat, count)
        while guess > 0:
            # not `>`: what is no number is to stay among the largest, so that the loss shows it
            places_N = (~(flat <= guess)).nonzero().squeeze(1)
            if len(places_N) >= count:
                return places_N
            guess = guess / 2 if guess > LEAST_GUESS else 0.0
        return (~(flat <= 0)).nonzero().squeeze(1)

    @staticmethod
    def _first_guess(flat: Tensor, count: int) -> float:
        """From one entry in many."""
        sample = flat[:: max(1, len(flat) // SAMPLE)]
        return float(sample.topk(max(1, min(len(sample), 2 * count * len(sample) // len(flat)))).values.min())
