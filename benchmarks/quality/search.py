"""Which learning rate and which coefficients come next, and what is read off between them. Pure numbers.

The same rules for every side; must not know any.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Final

from scipy.stats import t as student  # type: ignore[import-untyped]

from benchmarks.quality.figures import Figures

MIDDLE_RATE: Final = 1e-3
RATE_STEP: Final = 3
LEAST_RATES: Final = 5
MOST_RATES: Final = 9
GAP: Final = 2.0
"""Between neighbours that are interpolated between, the higher L0 is at most so many times the lower."""
MOST_COEFFICIENTS: Final = 10
FAR: Final = 4.0
"""An L0 that is so many times too high or too low: the next coefficient is three steps away, not one."""
HOPELESS: Final = 1.25
"""With so many times the best FVU, and more active latents than are wanted, a learning rate is given up."""
NOTHING_LEARNED: Final = 0.9
"""So it is with this FVU, whatever the best one is."""


def rate(place: float) -> float:
    """Of the grid's places, of which 0 is the middle."""
    return float(f"{MIDDLE_RATE * RATE_STEP**place:.3g}")


def best_rate(fvus: Mapping[float, float]) -> float:
    """With the lowest FVU."""
    return min(fvus, key=lambda lr: fvus[lr])


def next_rate(fvus: Mapping[float, float]) -> float | None:
    """What is to be tried next: five, more until the best has a worse one on either side, then half-way to these.

    From the middle outwards, as those far from the best are soon given up once a good one is known.

    `None` when that is done, or when the best is at an edge after `MOST_RATES`.
    """
    for place in sorted(range(-(LEAST_RATES // 2), LEAST_RATES // 2 + 1), key=lambda place: (abs(place), -place)):
        if rate(place) not in fvus:
            return rate(place)
    whole = {place: fvus[rate(place)] for place in range(-MOST_RATES, MOST_RATES) if rate(place) in fvus}
    best = min(whole, key=lambda place: (whole[place], -place))  # none has got there: it takes a higher one
    if best in (min(whole), max(whole)):
        beyond = best + (1 if best == max(whole) else -1)
        return rate(beyond) if len(whole) < MOST_RATES else None
    return next((lr for lr in (rate(best - 0.5), rate(best + 0.5)) if lr not in fvus), None)


def next_coefficient(
    l0s: Mapping[float, float], low: float, high: float, *, start: float, denser: float
) -> float | None:
    """What is to be tried next, for L0s on either side of `low` to `high` and no wide gap between.

    Args:
        l0s: what was found with each coefficient.
        low: the lowest L0 that is wanted.
        high: the highest.
        start: the first coefficient.
        denser: what a coefficient is multiplied by for more active latents.

    Returns:
        `None` when there is nothing to try, or too much was.

    """
    if not l0s:
        return start
    if len(l0s) >= MOST_COEFFICIENTS:
        return None
    if (least := min(l0s.values())) > low:  # beyond all that were tried, also where an L0 hardly depends on them
        step = denser ** (3 if least > FAR * low else 1)
        return min(l0s) / step if denser > 1 else max(l0s) / step
    if (most := max(l0s.values())) < high:
        step = denser ** (3 if most < high / FAR else 1)
        return max(l0s) * step if denser > 1 else min(l0s) * step
    for (one, l0), (other, next_l0) in pairwise(sorted(l0s.items(), key=lambda one: one[1])):
        between = math.sqrt(one * other)
        if next_l0 > low and l0 < high and next_l0 > GAP * l0 and between not in l0s:
            return between
    return None


def beginning(nearby: Mapping[float, Figures], wanted: float) -> float | None:
    """The coefficient that a neighbouring learning rate was nearest to the L0 with, if it came near and learned."""

    def distance(coefficient: float) -> float:
        return abs(math.log(nearby[coefficient]["validation_l0"] / wanted))

    learned = (tried for tried, figures in nearby.items() if figures["validation_fvu"] < NOTHING_LEARNED)
    return min((tried for tried in learned if distance(tried) < math.log(FAR)), key=distance, default=None)


def hopeless(points: Iterable[Figures], wanted: float, best: float) -> bool:
    """Whether one has more active latents than are wanted, and is so bad that with fewer it could not be the best.

    It spares the search for coefficients that give a learning rate much too low the L0 that is wanted, if any do.
    """
    limit = min(HOPELESS * best, NOTHING_LEARNED)
    return any(point["validation_l0"] > wanted and point["validation_fvu"] > limit for point in points)


def at_l0(points: Sequence[Figures], name: str, wanted: float) -> Figures | None:
    """Figures linear in the logarithm of the L0 that is called `name`; `None` where no two points are around it."""
    by_l0 = sorted((point for point in points if point[name] > 0), key=lambda point: point[name])
    if exact := [point for point in by_l0 if point[name] == wanted]:
        return exact[0]
    for one, other in pairwise(by_l0):
        if one[name] < wanted < other[name]:
            share = math.log(wanted / one[name]) / math.log(other[name] / one[name])
            return {figure: one[figure] + share * (other[figure] - one[figure]) for figure in one if figure in other}
    return None


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The mean ratio and its 95% interval, by Student's t on the logarithms."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), 0.0, math.inf
    half = float(student.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)
