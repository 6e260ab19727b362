"""The comparison's rows and its tables, for people and as plain figures. Trains nothing."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.quality.figures import Figures
from benchmarks.quality.runs import NotThere
from benchmarks.quality.search import interval
from benchmarks.quality.sides import SIDES
from benchmarks.quality.study import Study, Tuned

LEAST_SEEDS: Final = 5
"""With fewer nothing passes."""


@dataclass(frozen=True)
class Row:
    """One kind at one L0."""

    data: str
    kind: str
    wanted: float
    tuned: Mapping[str, Tuned]
    by_seed: Mapping[str, Mapping[int, Figures]]
    """By side and seed; seeds are missing that did not reach the L0."""
    ratios: list[float] = field(default_factory=list)
    """Our FVU by SAELens', a seed each."""

    @property
    def ratio(self) -> tuple[float, float, float] | None:
        """Mean and 95% interval."""
        return interval(self.ratios) if self.ratios else None

    @property
    def passed(self) -> bool:
        """Whether our FVU is lower, beyond doubt."""
        ratio = self.ratio
        return ratio is not None and len(self.ratios) >= LEAST_SEEDS and ratio[2] < 1

    def mean(self, side: str, name: str) -> float | None:
        """Of a figure over the seeds."""
        found = [figures[name] for figures in self.by_seed[side].values() if name in figures]
        return statistics.fmean(found) if found else None

    def figures(self) -> dict[str, Any]:
        """For the JSON file."""
        names = {name for seeds in self.by_seed.values() for figures in seeds.values() for name in figures}
        sides = {
            side: {
                "lr": tuned.lr,
                "lr_at_edge": tuned.at_edge,
                "validation_fvus": {f"{lr:g}": fvu for lr, fvu in tuned.validation_fvus.items() if fvu < 1e9},
                "coefficients": tuned.coefficients,
                "seeds": sorted(self.by_seed[side]),
                "means": {name: self.mean(side, name) for name in sorted(names)},
            }
            for side, tuned in self.tuned.items()
        }
        known = {"ratios": self.ratios, "ratio": self.ratio, "passed": self.passed}
        return {"data": self.data, "kind": self.kind, "l0": self.wanted, **known, "sides": sides}


def rows_of(study: Study) -> Iterator[Row]:
    """Of what there is; none while the kind is not tuned on both sides."""
    tuned = {}
    for side in SIDES:
        try:
            tuned[side] = study.tuned(side)
        except NotThere:
            continue
    if not {"ours", "saelens"} <= tuned.keys():
        return
    for wanted in study.wanted:
        by_seed: dict[str, dict[int, Figures]] = {side: {} for side in SIDES}
        for side, with_what in tuned.items():
            found = {seed: study.figures(side, with_what, seed, wanted) for seed in study.seeds_of(side)}
            by_seed[side] = {seed: figures for seed, figures in found.items() if figures}
        both = sorted(by_seed["ours"].keys() & by_seed["saelens"].keys())
        ratios = [by_seed["ours"][seed]["fvu"] / by_seed["saelens"][seed]["fvu"] for seed in both]
        yield Row(study.data, study.kind, wanted, tuned, by_seed, ratios)


def show(rows: list[Row], console: Console) -> None:
    """Both tables; in each cell ours, SAELens' and, behind a bar, its defaults'."""
    columns = ("data", "kind", "L0", "FVU", "ours / SAELens (95%)", "", "seeds", "best lr", "L0 as delivered")
    table = Table(*columns, title="FVU of held-out ordinary rows: ours, SAELens | its defaults")
    for row in rows:
        verdict = "" if len(row.ratios) < LEAST_SEEDS else "pass" if row.passed else "miss"
        ratio = "not bracketed" if row.ratio is None else "{:.3f} ({:.3f} to {:.3f})".format(*row.ratio)
        rates = ", ".join(f"{row.tuned[side].lr:g}{'!' * row.tuned[side].at_edge}" for side in ("ours", "saelens"))
        delivered = _cell(row, "delivered_l0", "{:.1f}".format)
        head = row.data, row.kind, f"{row.wanted:g}"
        table.add_row(*head, _cell(row, "fvu", "{:.4f}".format), ratio, verdict, f"{len(row.ratios)}", rates, delivered)
    console.print(table)
    others: dict[str, Callable[[float], str]] = {
        "fvu_all": "{:.3f}".format,
        "fvu_outliers": "{:.3f}".format,
        "never_fires": "{:.1%}".format,
        "recovered_zero": "{:.4f}".format,
        "recovered_mean": "{:.4f}".format,
        "mcc": "{:.3f}".format,
        "f1": "{:.3f}".format,
    }
    table = Table("data", "kind", "L0", *others, title="ours, SAELens | its defaults")
    for row in rows:
        cells = (_cell(row, name, shown) for name, shown in others.items())
        table.add_row(row.data, row.kind, f"{row.wanted:g}", *cells)
    console.print(table)


def _cell(row: Row, name: str, shown: Callable[[float], str]) -> str:
    found = {side: row.mean(side, name) for side in SIDES}
    if all(value is None for value in found.values()):
        return ""
    ours, theirs, defaults = ("-" if value is None else shown(value) for value in found.values())
    return f"{ours}, {theirs} | {defaults}"
