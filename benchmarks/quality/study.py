"""All trainings of one kind on some data: each side is tuned with seed 0, then trained with the others.

Owns which trainings there are; the rules for choosing the next one are `search`'s.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.quality.data import SHAPES
from benchmarks.quality.figures import Figures
from benchmarks.quality.runs import NotThere, Runs
from benchmarks.quality.search import at_l0, beginning, best_rate, hopeless, next_coefficient, next_rate
from benchmarks.quality.sides import BY_COEFFICIENT, DEFAULT_RATE, SIDES, Run

DEFAULTS_SEEDS: Final = 2
"""Enough for the row of `defaults`, which nothing is concluded from."""
START: Final = 5.0
"""First coefficient of a penalty."""
MARGIN: Final = 1.15
"""By which coefficients reach beyond the L0s that are wanted, as these differ from seed to seed."""


Points = Mapping[float, Figures]
"""Figures with seed 0, by coefficient."""


@dataclass(frozen=True)
class Tuned:
    """What a side is trained with."""

    lr: float
    coefficients: tuple[float | None, ...]
    validation_fvus: dict[float, float]
    """By learning rate; infinite where the L0 was not reached, or given up."""

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate has no worse one on a side after all."""
        return bool(self.validation_fvus) and self.lr in (min(self.validation_fvus), max(self.validation_fvus))


class Study:
    """One kind on some data."""

    def __init__(self, runs: Runs, data: str, kind: str, seeds: Sequence[int], steps: int) -> None:
        self.data, self.kind, self.seeds = data, kind, seeds
        self.shape, self.by_coefficient = SHAPES[data], kind in BY_COEFFICIENT
        self._runs, self._steps = runs, steps

    @property
    def wanted(self) -> tuple[float, ...]:
        """The L0s of the figures."""
        return self.shape.wanted if self.by_coefficient else (self.shape.k,)

    def carry_out(self, sides: Sequence[str] = tuple(SIDES)) -> None:
        """Train everything, all sides of a seed before the next seed."""
        tuned = {side: self.tuned(side) for side in sides}
        for seed in self.seeds:
            for side, with_what in tuned.items():
                if seed in self.seeds_of(side):
                    self.points(side, with_what, seed)

    def seeds_of(self, side: str) -> Sequence[int]:
        """That a side is trained with."""
        return self.seeds[:DEFAULTS_SEEDS] if side == "defaults" else self.seeds

    def tuned(self, side: str) -> Tuned:
        """The learning rate with the lowest FVU on validation rows, and coefficients around all wanted L0s."""
        if side == "defaults":
            return Tuned(DEFAULT_RATE, self._coefficients(side, DEFAULT_RATE, {}), {})
        fvus: dict[float, float] = {}
        points: dict[float, Points] = {}
        while (lr := next_rate(fvus)) is not None:
            if self.by_coefficient:
                points[lr] = self._tried(side, lr, points, min(fvus.values(), default=math.inf))
                fvus[lr] = self._at_middle(points[lr])
            else:
                fvus[lr] = self._figures(side, lr, None, 0).get("validation_fvu", math.inf)
        lr = best_rate(fvus)
        return Tuned(lr, self._coefficients(side, lr, points.get(lr, {})), fvus)

    def points(self, side: str, tuned: Tuned, seed: int) -> list[Figures]:
        """Figures with each coefficient; without those that diverged."""
        points = (self._figures(side, tuned.lr, coefficient, seed) for coefficient in tuned.coefficients)
        return [point for point in points if point]

    def figures(self, side: str, tuned: Tuned, seed: int, wanted: float) -> Figures | None:
        """At an L0; `None` if it was not reached, or is not measured yet."""
        try:
            points = self.points(side, tuned, seed)
        except NotThere:
            return None
        if self.by_coefficient:
            return at_l0(points, "l0", wanted)
        return points[0] if points else None

    def _figures(self, side: str, lr: float, coefficient: float | None, seed: int) -> Figures:
        return self._runs(Run(self.data, side, self.kind, lr, coefficient, seed, self._steps))

    def _tried(self, side: str, lr: float, others: Mapping[float, Points], best: float) -> Points:
        """On either side of the middle one of the wanted L0s, unless it is seen to be hopeless before."""
        middle = self.shape.middle
        nearby = others[min(others, key=lambda other: abs(math.log(other / lr)))] if others else {}
        return self._bracketed(side, lr, (middle, middle), {}, beginning(nearby, middle), best)

    def _at_middle(self, points: Points) -> float:
        """The FVU of validation rows; infinite where the L0 was not reached, or given up."""
        found = at_l0(list(points.values()), "validation_l0", self.shape.middle)
        return found["validation_fvu"] if found else math.inf

    def _coefficients(self, side: str, lr: float, tried: Points) -> tuple[float | None, ...]:
        """Those that gave the wanted L0s with seed 0, and one beyond at either end; none where it gave none of them."""
        if not self.by_coefficient:
            return (None,)
        low, high = min(self.wanted) / MARGIN, max(self.wanted) * MARGIN
        points = self._bracketed(side, lr, (low, high), tried)
        ordered = sorted(points, key=lambda coefficient: points[coefficient]["validation_l0"])
        l0s = [points[coefficient]["validation_l0"] for coefficient in ordered]
        if not l0s or l0s[0] > high or l0s[-1] < low:
            return ()
        first = max((place for place, l0 in enumerate(l0s) if l0 <= low), default=0)
        last = min((place for place, l0 in enumerate(l0s) if l0 >= high), default=len(l0s) - 1)
        return tuple(ordered[first : last + 1])

    def _bracketed(
        self,
        side: str,
        lr: float,
        l0: tuple[float, float],
        tried: Points,
        start: float | None = None,
        best: float = math.inf,
    ) -> Points:
        """Figures by coefficient, `tried` and as many as it takes; one that diverged ends the search."""
        aims_at_l0 = side == "ours" and self.kind == "jumprelu"
        first, denser = (self.shape.middle, 2.0) if aims_at_l0 else (START, 1 / 3)
        points = dict(tried)
        while not hopeless(points.values(), l0[0], best):
            l0s = {coefficient: figures["validation_l0"] for coefficient, figures in points.items()}
            coefficient = next_coefficient(l0s, *l0, start=start or first, denser=denser)
            if coefficient is None or not (figures := self._figures(side, lr, coefficient, 0)):
                break
            points[coefficient] = figures
        return points
