"""One table and one plot over all SAEs of a job: which has the least error for its number of active latents.

Draws and writes figures that were measured elsewhere; knows no SAE and no rows.
"""

import csv
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from mistudio_schemas import SAEResult

FIGURES: Final = ("fvu", "explained_variance", "cosine", "l0", "dead_share", "never_active_share", "training_fvu")
ABOUT: Final = ("name", "kind", "layer_number", "hook_site", "predicts", "feature_count", "steps", "stop_reason")
LOSSES: Final = ("clean", "spliced", "zero", "mean", "recovered_zero", "recovered_mean")


def write_table(path: Path, results: Sequence[SAEResult]) -> None:
    """A line an SAE, the primary one first, with its folder below that one's; CSV, what is not defined is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*ABOUT, *FIGURES, *(f"cross_entropy_{name}" for name in LOSSES), "folder"])
        for result in results:
            losses = result.metrics.cross_entropy
            writer.writerow(
                [
                    *(getattr(result, name) for name in ABOUT),
                    *(getattr(result.metrics, name) for name in FIGURES),
                    *(getattr(losses, name, None) for name in LOSSES),
                    result.prefix.removeprefix(results[0].prefix),
                ]
            )


def write_frontier(path: Path, results: Sequence[SAEResult]) -> None:
    """FVU against L0, a line for each kind, site and width; SAEs without either are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes: Any = figure.subplots()
    drawable = [one for one in results if one.metrics.l0 and one.metrics.fvu is not None]
    for label, group in groupby(sorted(drawable, key=_place), key=_label):
        points = [(one.metrics.l0, one.metrics.fvu) for one in group]
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set_xscale("log")
    axes.set_xlabel("L0: active latents a row")
    axes.set_ylabel("FVU: share of the variance not reconstructed")
    axes.grid(visible=True, which="both", alpha=0.3)
    if drawable:
        axes.legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(path)  # type: ignore[no-untyped-call]


def _label(result: SAEResult) -> str:
    site = "" if result.sites == "resid_post" else f" {result.sites}"
    return f"{result.kind}, layer {result.layer_number}{site}, {result.feature_count} latents"


def _place(result: SAEResult) -> tuple[str, float]:
    return _label(result), result.metrics.l0 or 0.0
