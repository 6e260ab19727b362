"""A run's numbers as the page says them: which are shown, in what words, and which curves and bars.

Owns the choice and the wording; what a number means is the contract's own sentence. Measures nothing.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from mistudio_schemas import CrossEntropy, SAEMetrics, SAEResult

from .charts import Chart, Series, bar_chart, line_chart
from .neighbours import Neighbours
from .shown import shown

HEADLINES: Final = {
    "fvu": ("FVU", "of the variance is not reconstructed"),
    "l0": ("L0", "active latents a row"),
    "never_active_share": ("Never active", "of the latents, on any row"),
    "cosine": ("Cosine", "of rows and reconstructions, in the mean"),
    "final_loss": ("Loss", "of training, in the mean of the last epoch"),
}
SHARES: Final = ("fvu", "never_active_share")
SHOWN: Final = (
    "fvu", "explained_variance", "cosine", "mse", "l0", "fraction_active", "dead_share", "never_active_share",
    "training_fvu", "fvu_ordinary", "fvu_outliers", "outliers_variance_share", "final_loss",
)  # fmt: skip
LOSSES: Final = ("clean", "spliced", "zero", "mean", "recovered_zero", "recovered_mean")
FIRING: Final = ("never", "<1e-6", *(f"1e{power / 2:g}" for power in range(-12, 0)))
COSINES: Final = 20
FEW_STEPS: Final = 5
PROBED: Final = (1, 5, 20)
"""Numbers of features whose accuracy is shown."""
CURVES: Final = (
    ("Loss", (("loss", "step", "loss"), ("reconstruction", "step", "reconstruction_loss"))),
    ("L0: active latents a row", (("training", "step", "l0"), ("held out", "held_out", "l0"))),
    ("Dead latents, share", (("training", "step", "dead_share"),)),
    ("FVU of held-out rows", (("held out", "held_out", "fvu"),)),
)


Panel = tuple[str, list[tuple[str, Series]]]
"""A title, and the curves below it by their labels."""


@dataclass(frozen=True)
class Figure:
    """A number with its name and meaning."""

    name: str
    value: str
    means: str


@dataclass(frozen=True)
class SweepRow:
    """One SAE among all of the job's."""

    name: str
    kind: str
    site: str
    latents: str
    l0: str
    fvu: str
    cosine: str
    never: str
    recovered: str
    link: str | None
    """Its own page, from this one; `None` where this is it."""
    here: bool


def said(value: float | None) -> str:
    """A number for a person: four digits; a dash where there is none."""
    if value is None:
        return "-"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share for a person."""
    return "-" if value is None else f"{100 * value:.3g}%"


def duration(seconds: float) -> str:
    """A time for a person."""
    minutes, hours = round(seconds) // 60 % 60, round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {round(seconds) % 60:02} s" if minutes else f"{seconds:.3g} s"


def headlines(result: SAEResult, seconds: float | None) -> list[Figure]:
    """The few that say how good it is, and how long training took."""
    metrics = result.metrics
    tiles = [
        Figure(name, (percent if field in SHARES else said)(getattr(metrics, field)), means)
        for field, (name, means) in HEADLINES.items()
    ]
    if seconds is not None:
        tiles.append(Figure("Training", duration(seconds), f"{result.steps:,} steps, {result.epochs_trained} passes"))
    if metrics.cross_entropy is not None:
        recovered = percent(metrics.cross_entropy.recovered_zero)
        tiles.append(Figure("Loss recovered", recovered, "of what the model loses with nothing in this place"))
    return tiles


def table(metrics: SAEMetrics) -> list[Figure]:
    """Every figure of the evaluation that is defined."""
    found = list(_fields(metrics, SHOWN))
    if metrics.cross_entropy is not None:
        found += _fields(metrics.cross_entropy, LOSSES, "cross-entropy, ")
    return found


def judged_by(metrics: SAEMetrics) -> str:
    """On which rows the figures are."""
    if metrics.held_out:
        return f"On {said(metrics.rows)} rows of texts that were held out of training, unless a line says otherwise."
    return f"On the {said(metrics.rows)} rows that it was trained on: no text was held out, so these flatter it."


@dataclass(frozen=True)
class ProbeRow:
    """What tells one label."""

    label: str
    texts: str
    features: list[int]
    """The most telling ones."""
    accuracies: list[str]
    """With one feature, with five, with all that were tried, and with all dimensions."""


def probe_rows(probing: Path) -> list[ProbeRow]:
    """Of `probing.json`, each label and their mean; nothing where there is none."""
    if not probing.exists():
        return []
    told = json.loads(probing.read_text(encoding="utf-8"))

    def row(label: str, texts: int, features: list[int], found: dict[str, Any]) -> ProbeRow:
        of_k = dict(zip(told["features"], found["balanced_accuracy"], strict=True))
        shown_accuracies = [of_k[k] for k in PROBED] + [found["all_dimensions"]]
        return ProbeRow(label, f"{texts:,}", features, [percent(one) for one in shown_accuracies])

    labels = [row(shown(one["label"]), one["texts"], one["features"][:3], one) for one in told["of_labels"]]
    return [row(f"mean of {told['labels']}", told["texts"], [], told), *labels]


def curves(log: Path) -> list[Panel]:
    """The panels of the training log, those that have points."""
    lines = list(_lines(log))
    if sum(line["event"] == "step" for line in lines) < FEW_STEPS:  # a short run's epochs say more
        lines = [line for line in lines if line["event"] != "step"]
        lines = [line | {"event": "step"} if line["event"] == "epoch" else line for line in lines]
    panels = []
    for title, series in CURVES:
        drawn: list[tuple[str, Series]] = [
            (label, [(line["step"], line.get(field)) for line in lines if line["event"] == event])
            for label, event, field in series
        ]
        drawn = [(label, points) for label, points in drawn if any(value is not None for _, value in points)]
        if drawn:
            panels.append((title, drawn))
    return panels


def curve_charts(panels: Sequence[Panel]) -> list[Chart]:
    """The same, to be drawn on the page."""
    charts = (line_chart(title, "step", series, dots=_few(series)) for title, series in panels)
    return [one for one in charts if one is not None]


def spreads(metrics: SAEMetrics, near: Neighbours) -> list[Chart]:
    """How often features are active, and how near their directions are to one another."""
    charts = []
    if metrics.firing_histogram:
        rates = "share of all rows on which a feature is active"
        charts.append(bar_chart("Firing density", rates, FIRING, metrics.firing_histogram, every=2))
    if near.cosine.size:
        counts = [0] * COSINES
        for cosine in near.cosine[:, 0].tolist():
            counts[min(COSINES - 1, max(0, int(cosine * COSINES)))] += 1
        labels = [f"{place / COSINES:g}" for place in range(COSINES)]
        charts.append(bar_chart("Decoder: cosine to the nearest other", "cosine", labels, counts, every=4))
    return charts


def sweep_rows(results: Sequence[SAEResult], here: SAEResult) -> list[SweepRow]:
    """All SAEs of the job, linked from the page of one; nothing where it is alone."""
    if len(results) < 2:
        return []
    root = results[0].prefix
    up = "../" if here.prefix == root else "../../../"

    def row(one: SAEResult) -> SweepRow:
        metrics, losses = one.metrics, one.metrics.cross_entropy
        mine = one.name == here.name
        return SweepRow(
            one.name, one.kind, f"{one.layer_number}.{one.sites}", said(one.feature_count), said(metrics.l0),
            said(metrics.fvu), said(metrics.cosine), percent(metrics.never_active_share),
            percent(losses.recovered_zero if losses else None),
            None if mine else f"{up}{one.prefix.removeprefix(root)}report/index.html", mine,
        )  # fmt: skip

    return [row(one) for one in results]


def frontier(results: Sequence[SAEResult]) -> Chart | None:
    """FVU against L0, a line for each kind, site and width."""
    if len(results) < 2:
        return None

    def label(one: SAEResult) -> str:
        return f"{one.kind}, {one.layer_number}.{one.sites}, {one.feature_count:,} latents"

    series = [
        (name, sorted((float(one.metrics.l0 or math.nan), one.metrics.fvu) for one in group))
        for name, group in groupby(sorted(results, key=label), key=label)
    ]
    return line_chart("FVU against L0", "L0: active latents a row", series, log_x=True, dots=True)


def _few(series: Sequence[tuple[str, Series]]) -> bool:
    return all(len(points) <= 25 for _, points in series)


def _fields(figures: SAEMetrics | CrossEntropy, names: Sequence[str], before: str = "") -> Iterator[Figure]:
    for name in names:
        value = getattr(figures, name)
        if value is not None:
            means = type(figures).model_fields[name].description or ""
            yield Figure(before + name.replace("_", " "), said(value), means)


def _lines(log: Path) -> Iterator[dict[str, Any]]:
    if log.exists():
        with log.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file)
