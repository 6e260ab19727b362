"""Which entries of a matrix are the largest, of each row or of all: exactly, and faster than one selection from all.

Owns the choice; must not know what the entries are, nor what becomes of them.
"""

import numpy as np
import torch
from torch import Tensor

from .sparse import Active

LEAST_GROUP = 4
BY_PARTITION = (torch.float32, torch.float64)
GUESS_BELOW = 0.9
"""Of the last smallest chosen entry; further down there would be more to select from, nearer to it more misses."""
LEAST_GUESS = 1e-6
SAMPLE = 100_003
"""Entries that the first guess is made from."""


def largest_of_rows(matrix_BF: Tensor, k: int) -> Tensor:
    """Where the k largest entries of each row are: int64 [B, k], in no order; of equal ones at the border any.

    In two stages where that is faster. A row's k largest lie in those k of its groups of entries that have the
    largest maxima, so that the second selection is from few. Entries of a group are apart, so that maxima are taken of
    whole vectors.
    """
    rows, columns = matrix_BF.shape
    size = _group_size(columns, k)
    if size < LEAST_GROUP:
        return _selected(matrix_BF, k)
    groups = columns // size
    grouped = matrix_BF.view(rows, size, groups)
    best_BK = _selected(grouped.amax(1), k)
    candidates = grouped.gather(2, best_BK[:, None, :].expand(rows, size, k)).view(rows, size * k)
    chosen_BK = _selected(candidates, k)
    return chosen_BK.div(k, rounding_mode="floor") * groups + best_BK.gather(1, chosen_BK % k)


def _selected(matrix_BN: Tensor, k: int) -> Tensor:
    """The same in one stage; on a CPU by NumPy's partition, in half of PyTorch's time."""
    if matrix_BN.dtype in BY_PARTITION and not matrix_BN.is_cuda:
        array, columns = matrix_BN.detach().numpy(), matrix_BN.shape[1]
        least_B = np.partition(array, columns - k, axis=1)[:, columns - k]
        # not `>=`: what is no number is the largest, to PyTorch, too
        places_N = np.flatnonzero(~(array < least_B[:, None]))
        if len(places_N) == len(array) * k:  # or some are equal at a border
            return torch.from_numpy(places_N % columns).view(-1, k)
    return matrix_BN.topk(k, dim=1, sorted=False).indices


def _group_size(columns: int, k: int) -> int:
    """A power of two that divides the columns, at most about √(columns / k): then both stages have as many entries."""
    size = 1
    while columns % (2 * size) == 0 and (2 * size) ** 2 <= 2 * columns / k:
        size *= 2
    return size


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
        if flat.is_cuda:  # which must not be asked for any number on the way
            places_N = largest_of_rows(flat[None], count)[0].sort().values
            return Active.at(places_N, *matrix_BF.shape), flat[places_N].min().clamp_min(0).float()
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
