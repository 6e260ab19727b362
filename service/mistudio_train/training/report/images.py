"""The same plots as pictures, for a slide or a message: PNG files beside the page.

Draws figures that were measured elsewhere; knows no SAE.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .charts import Series


def write_curves(path: Path, panels: Sequence[tuple[str, Sequence[tuple[str, Series]]]]) -> None:
    """A panel for each of the curves, over training steps."""
    figure, axes = _panels(len(panels))
    for one, (title, series) in zip(axes, panels, strict=True):
        for label, points in series:
            defined = [(x, y) for x, y in points if y is not None]
            if defined:
                one.plot(*zip(*defined, strict=True), label=label)
        one.set_title(title, fontsize="medium")
        one.set_xlabel("step")
        one.grid(visible=True, alpha=0.3)
        if len(series) > 1 and one.lines:
            one.legend(fontsize="small")
    _save(figure, path)


def write_bars(path: Path, title: str, x_label: str, labels: Sequence[str], counts: Sequence[int]) -> None:
    """One bar chart."""
    figure, (axes,) = _panels(1)
    axes.bar(range(len(counts)), counts, width=0.9)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize="small")
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x_label)
    axes.set_ylabel("features")
    _save(figure, path)


def _panels(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(6 * columns, 3.6 * rows), layout="constrained")
    every: Any = figure.subplots(rows, columns, squeeze=False)
    return figure, list(every.flat)[:count]


def _save(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)  # type: ignore[no-untyped-call]
