"""What a job will take, concluded from what earlier ones took, and how far off that is for those themselves.

Owns the arithmetic; reads no file and asks no model.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mistudio_train.paces import Pace, Part

LEAST_SECONDS: Final = 0.05
"""Of a part that is weighed as if it had taken no less."""
BY_CHANCE: Final = 4
"""By how much more amounts fit better by chance, times their number for each job that is left over."""
TRIED: Final = 40
"""Of the latest jobs, that are estimated from the others to say the error."""
FAR: Final = 4.0
"""Times as much, or as little, as any earlier job had of something: what is said of it may be far off."""


@dataclass(frozen=True)
class Error:
    """By how much earlier jobs were missed, each estimated from the others, as shares of what was so."""

    median: float
    worst: float
    jobs: int


@dataclass(frozen=True)
class Expected:
    """Of a job that is not yet done."""

    parts: Mapping[str, float]
    """Seconds of each."""
    error: Error | None
    """`None`: there are fewer than two earlier jobs."""
    beyond: Sequence[str]
    """The parts of which no earlier job had nearly as much, or nearly as little."""
    unknown: Sequence[str]
    """The parts that no earlier job had, and that are not counted."""

    @property
    def seconds(self) -> float:
        """Of all."""
        return sum(self.parts.values())


def expected(units: Mapping[str, tuple[float, ...]], paces: Sequence[Pace]) -> Expected:
    """How long it will take.

    Args:
        units: what there is to do, as `training.work` counts it.
        paces: earlier jobs on the same device; one at least.

    """
    parts = {name: _seconds(name, wanted, paces) for name, wanted in units.items()}
    return Expected(
        parts={name: seconds for name, seconds in parts.items() if seconds is not None},
        error=time_error(paces),
        beyond=[name for name, wanted in units.items() if parts[name] is not None and _is_far(name, wanted, paces)],
        unknown=[name for name, seconds in parts.items() if seconds is None],
    )


def time_error(paces: Sequence[Pace]) -> Error | None:
    """Of the time, each job estimated from all others, by what there was to do in the end."""
    missed = []
    for number in range(max(0, len(paces) - TRIED), len(paces)):
        others, one = [*paces[:number], *paces[number + 1 :]], paces[number]
        found = {name: _seconds(name, part.units, others) for name, part in one.parts.items()}
        took = sum(part.seconds for name, part in one.parts.items() if found[name] is not None)
        if took:
            missed.append(abs(sum(seconds or 0.0 for seconds in found.values()) / took - 1))
    return _error(missed) if len(paces) > 1 else None


def share_error(planned_and_so: Iterable[tuple[int, int]]) -> Error | None:
    """Of a figure that was said before, and what it was in the end."""
    return _error([abs(planned / so - 1) for planned, so in planned_and_so if so])


def active_share(kind: str, paces: Sequence[Pace]) -> float | None:
    """Of the latents, that are active on a row: the median of earlier SAEs of that kind; `None`: there were none."""
    shares = [pace.active_share[kind] for pace in paces if kind in pace.active_share]
    return median(shares) if shares else None


def _error(missed: list[float]) -> Error | None:
    return Error(median(missed), max(missed), len(missed)) if missed else None


def _known(name: str, amounts: int, paces: Sequence[Pace]) -> list[Part]:
    """The part in earlier jobs; of the training of a kind that none had, that of other kinds.

    A version that counted other amounts has left parts that say nothing of these.
    """
    parts = [(other, part) for pace in paces for other, part in pace.parts.items() if len(part.units) == amounts]
    same = [part for other, part in parts if other == name]
    if same or " " not in name:
        return same
    phase = name.partition(" ")[0] + " "
    return [part for other, part in parts if other.startswith(phase)]


def _seconds(name: str, wanted: tuple[float, ...], paces: Sequence[Pace]) -> float | None:
    known = _known(name, len(wanted), paces)
    return _fitted(np.array(wanted), known) if known else None


def _is_far(name: str, wanted: tuple[float, ...], paces: Sequence[Pace]) -> bool:
    amounts = [part.units[0] for part in _known(name, len(wanted), paces)]
    return not min(amounts) / FAR <= wanted[0] <= max(amounts) * FAR


def _fitted(wanted_U: NDArray[np.float64], known: Sequence[Part]) -> float:
    """Seconds as a sum of multiples, none negative, of some of the amounts: those that earlier jobs tell apart.

    Least squares of relative errors, by which a job counts the more the nearer its main amount is to the wanted one.
    All sets of amounts are tried, as they are few, and larger ones have to be better by as much as they can be by
    chance.
    """
    units_NU, seconds_N = np.array([part.units for part in known]), np.array([part.seconds for part in known])
    seconds_N = np.maximum(seconds_N, LEAST_SECONDS)
    away_N = np.log(np.maximum(units_NU[:, 0], 1) / max(wanted_U[0], 1))
    weights_N = 1 / (1 + away_N**2)
    best, found = float("inf"), 0.0
    had = np.flatnonzero(units_NU.any(axis=0)).tolist()
    for size in range(1, min(len(had), (len(known) + 1) // 2) + 1):
        for chosen in map(list, combinations(had, size)):
            rows_NC = units_NU[:, chosen] / seconds_N[:, None]
            scale_C = rows_NC.max(axis=0)
            root_N = np.sqrt(weights_N)
            multiples_C, *_ = np.linalg.lstsq(rows_NC / scale_C * root_N[:, None], root_N, rcond=None)
            if (multiples_C < 0).any():
                continue
            missed = float((weights_N * (rows_NC / scale_C @ multiples_C - 1) ** 2).sum() / weights_N.sum())
            score = (missed + 1e-4) * (1 + BY_CHANCE * size / max(1, len(known) - size))
            if score < best:
                best, found = score, float(wanted_U[chosen] / scale_C @ multiples_C)
    return found
