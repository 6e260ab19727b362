"""Features as Neuronpedia takes them up: `features/neuronpedia/batch-N.json`, as SAEDashboard writes them.

Owns that format; what is shown of a feature is chosen in `gathered`. Holds one feature at a time.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from mistudio_schemas import SAEResult
from mistudio_train.training.files import whole

from .gathered import Gathered
from .material import Material
from .places import BANDS, BINS

FOLDER: Final = Path("features") / "neuronpedia"
BATCH: Final = 1024
"""Features of a file: some megabytes."""
DIGITS: Final = 3
"""That SAEDashboard rounds to, too."""
TINY: Final = 1e-30
ALIGNED: Final = 3
"""Neurons that a feature's direction is said to lie along."""
UNKNOWN: Final = (
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
    "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson",
    "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist", "vector",
)  # fmt: skip
"""Lists that stay empty, as they may: nothing here has measured what they hold."""

Json = dict[str, Any]


@dataclass(frozen=True)
class _Prompts:
    """What all features have been looked for in."""

    total: int
    tokens: int
    dataset: str
    rows: int


def write_neuronpedia(
    folder: Path,
    result: SAEResult,
    gathered: Gathered,
    material: Material,
    context_size: int,
    on_progress: Callable[[], None],
) -> None:
    """Write the features that have a card on the page, in the order of their numbers.

    Args:
        folder: of the SAE's files.
        result: what is said of the SAE.
        gathered: its features; of rows that are tokens.
        material: the rest.
        context_size: tokens of a window at most.
        on_progress: called now and then.

    Raises:
        DiskFull: if the disk has no room.

    """
    corpus, rows = material.corpus, len(material.index.text_of_row)
    prompts = _Prompts(corpus.windows, context_size, material.request.corpus_file, rows)
    head = {
        "model_id": Path(material.model.model_name).name,
        "layer": result.layer_number,
        "sae_set": result.name,
        "sae_id_suffix": None,
    }
    order, aside = np.sort(gathered.order), folder / f"{FOLDER}.partial"
    try:
        for number, first in enumerate(range(0, len(order), BATCH)):
            features = _features(gathered, order[first : first + BATCH].tolist(), prompts, on_progress)
            _write(aside / f"batch-{number}.json", head, features)
        aside.rename(folder / FOLDER)
    finally:  # all batches are there, or none is
        shutil.rmtree(aside, ignore_errors=True)


def _write(path: Path, head: Json, features: Iterable[Json]) -> None:
    """One JSON object, a line a feature."""
    with whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(_plain(head)[:-1] + ', "features": [')
        for number, one in enumerate(features):
            file.write((",\n" if number else "\n") + _plain(one))
        file.write("\n]}\n")


def _plain(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _features(
    gathered: Gathered, numbers: Iterable[int], prompts: _Prompts, on_progress: Callable[[], None]
) -> Iterator[Json]:
    for number in numbers:
        yield _feature(gathered, number, prompts)
        on_progress()


def _feature(gathered: Gathered, number: int, prompts: _Prompts) -> Json:
    sources = gathered.sources
    maximum, counts_B = float(sources.maxima[number]), sources.histograms[number]
    centres_B = (np.arange(BINS) + 0.5) * maximum / BINS
    return {
        "feature_index": number,
        **_aligned(gathered.sae.decoder_weight[:, number]),
        **{name: [] for name in UNKNOWN},
        **_logits(gathered, number),
        "frac_nonzero": float(sources.rates[number]),
        "freq_hist_data_bar_values": _rounded(centres_B),
        "freq_hist_data_bar_heights": [float(count) for count in counts_B.tolist()],
        "n_prompts_total": prompts.total,
        "n_tokens_in_prompt": prompts.tokens,
        "dataset": prompts.dataset,
        "activations": [_activation(gathered, window, prompts.rows) for window in sources.windows_of(number)],
    }


def _aligned(direction_D: torch.Tensor) -> Json:
    """The largest of the direction's elements, and their shares of its L1 norm."""
    found = direction_D.float().topk(min(ALIGNED, len(direction_D)))
    return {
        "neuron_alignment_indices": found.indices.tolist(),
        "neuron_alignment_values": _rounded(found.values.cpu().numpy()),
        "neuron_alignment_l1": _rounded(
            (found.values.abs() / direction_D.float().abs().sum().clamp_min(TINY)).cpu().numpy()
        ),
    }


def _logits(gathered: Gathered, number: int) -> Json:
    promoted, piece = gathered.sources.promoted, gathered.sources.vocabulary.piece
    if promoted is None:
        return {"neg_str": [], "neg_values": [], "pos_str": [], "pos_values": []}
    return {
        "neg_str": [piece(token) for token in promoted.least[number].tolist()],
        "neg_values": _rounded(promoted.least_logits[number]),
        "pos_str": [piece(token) for token in promoted.most[number].tolist()],
        "pos_values": _rounded(promoted.most_logits[number]),
    }


def _activation(gathered: Gathered, window: int, rows: int) -> Json:
    """Of the strongest places the bin is none, and said so as SAEDashboard does."""
    sources, windows = gathered.sources, gathered.sources.windows
    number, band = int(windows.places.feature[window]), int(windows.places.band[window])
    start, stop = int(windows.start[window]), int(windows.stop[window])
    return {
        **_bin(gathered, number, band, rows),
        "tokens": sources.pieces(start, stop),
        "values": _rounded(windows.strengths[window, : stop - start]),
        "qualifying_token_index": int(windows.places.row[window]) - start,
    }


def _bin(gathered: Gathered, number: int, band: int, rows: int) -> Json:
    """Bands are fifths of the maximum; what a bin contains is a share of all rows, those at 0 in the lowest."""
    sources = gathered.sources
    maximum = float(sources.maxima[number])
    if band == 0:
        return {"bin_min": -1.0, "bin_max": round(maximum, DIGITS), "bin_contains": -1.0}
    fifth = BANDS - 1 - band
    wide = BINS // BANDS
    inside = int(sources.histograms[number, fifth * wide : (fifth + 1) * wide].sum()) / rows
    return {
        "bin_min": round(fifth * maximum / BANDS, DIGITS),
        "bin_max": round((fifth + 1) * maximum / BANDS, DIGITS),
        "bin_contains": inside + (1 - float(sources.rates[number]) if fifth == 0 else 0),
    }


def _rounded(values: NDArray[Any]) -> list[float]:
    return [round(value, DIGITS) for value in values.astype(np.float64).tolist()]
