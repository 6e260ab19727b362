"""Makes the report of one SAE out of the files that its job has written and the corpus that it has seen.

Reads top to bottom as the page is made; must not fail a job, nor know how anything on it was computed.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mistudio_schemas import SAEResult
from mistudio_train.training.files import whole
from mistudio_train.training.promoted import Promoted

from .cards import Sources, card
from .figures import (
    FIRING,
    Panel,
    curve_charts,
    curves,
    frontier,
    headlines,
    judged_by,
    probe_rows,
    said,
    spreads,
    sweep_rows,
    table,
)
from .gathered import Gathered
from .images import write_bars, write_curves
from .material import Material
from .packs import Card, packed
from .page import Head, Index, Page, rendered
from .shown import shown

FOLDER: Final = "report"
FORMATS: Final = ("SAELens", "EleutherAI sparsify")
"""Of folders that other software reads; where there is none, `metadata.json` says why in the same place."""


def write_report(
    folder: Path,
    result: SAEResult,
    all_results: Sequence[SAEResult],
    gathered: Gathered,
    material: Material,
    on_progress: Callable[[], None],
) -> None:
    """Write `report/index.html` and its pictures.

    Args:
        folder: of the SAE's files.
        result: what is said of the SAE.
        all_results: of all SAEs of the job, the primary one first.
        gathered: its features.
        material: the rest.
        on_progress: called now and then.

    Raises:
        DiskFull: if the disk has no room.

    """
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    sources, order = gathered.sources, gathered.order
    packs = list(packed(_cards(sources, order, on_progress)))
    index, panels = _index(order, sources.rates, packs, material.whole_texts), curves(folder / "training_log.jsonl")
    page = Page(
        head=_head(result, material, metadata),
        tiles=headlines(result, metadata["training_results"].get("training_seconds")),
        asked=_asked(result, material, metadata),
        warnings=material.warnings,
        curves=curve_charts(panels),
        judged_by=judged_by(result.metrics),
        figures=table(result.metrics),
        spreads=spreads(result.metrics, sources.neighbours),
        sweep=sweep_rows(all_results, result),
        frontier=frontier(all_results),
        probed=probe_rows(folder / "probing.json"),
        features_note=_note(index, order, sources.promoted, material),
        index=index,
        packs=[text for _, text in packs],
        load_lines=_load_lines(result, metadata),
        request_json=_request_json(material, metadata),
    )
    _write(folder / FOLDER, page)
    _write_pictures(folder / FOLDER, result, panels)


def _cards(sources: Sources, order: NDArray[np.int64], on_progress: Callable[[], None]) -> Iterator[Card]:
    for feature in order.tolist():
        yield card(sources, feature)
        on_progress()


def _index(
    order: NDArray[np.int64], rate_F: NDArray[np.float64], packs: Sequence[tuple[int, str]], whole_texts: bool
) -> Index:
    sizes = [size for size, _ in packs]
    begins = [sum(sizes[:number]) for number in range(len(sizes))]
    with_card = order[: sum(sizes)]
    rates = [round(rate, 8) for rate in rate_F[with_card].tolist()]
    return Index(len(rate_F), "texts" if whole_texts else "tokens", with_card.tolist(), rates, begins)


def _note(index: Index, order: NDArray[np.int64], promoted: Promoted | None, material: Material) -> str:
    note = (
        f"{len(index.feature):,} of {index.total:,} features have a card here; "
        f"{index.total - len(order):,} are never active, or weaker than all of these. "
    )
    if len(index.feature) < len(order):
        note += f"The page has no room for {len(order) - len(index.feature):,} weaker ones; the store has all. "
    if material.whole_texts:
        return note + "Texts are ranked by how active a feature is on them, from all over its range."
    note += "Tokens are marked by how active the feature is on them; contexts are from all over its range. "
    if promoted is None:
        return note + "Which tokens features promote is not shown: the model's head was not loaded, or has none."
    return note + "Promoted tokens are the head applied to the feature's direction: most telling in late blocks."


def _head(result: SAEResult, material: Material, metadata: dict[str, Any]) -> Head:
    return Head(
        f"{result.name}: {result.kind}, {result.feature_count:,} latents",
        f"{Path(material.model.model_name).name}, {result.sites} of block {result.layer_number}, "
        f"{material.corpus.tokens:,} tokens of {material.corpus.texts:,} texts",
        f"Job {material.job_id}. Made by miStudioTrain {material.version} at {metadata['timestamp']}.",
    )


def _asked(result: SAEResult, material: Material, metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """What decides most, as it was used."""
    used, rows = metadata["sae_config"], result.rows
    pairs: list[tuple[str, Any]] = [
        ("Model", material.model.model_name),
        ("Revision", material.revision),
        ("Site", f"{result.sites} of block {result.layer_number}, width {result.input_dim:,}"),
        ("Corpus", material.request.corpus_file),
        ("Corpus sha256", material.corpus.sha256[:16] + "…"),
        ("Rows", "a text each, the mean of its tokens" if material.whole_texts else "a token each"),
        ("Kind", result.kind),
        ("Latents", f"{result.feature_count:,}"),
        ("k", used.get("k")),
        ("Sparsity", used.get("sparsity_coeff")),
        ("Learning rate", used.get("learning_rate")),
        ("Batch", used.get("batch_size")),
        ("Trained", f"{result.steps:,} steps, {result.epochs_trained} epochs, until {result.stop_reason}"),
        ("Rows trained on", None if rows is None else f"{rows.training:,} of {rows.total:,}"),
        ("Left out", None if rows is None or not rows.left_out else f"{rows.left_out:,} first tokens and high norms"),
        ("Seed", used.get("seed")),
        ("Device", metadata["training_results"].get("device")),
    ]
    return [(name, value if isinstance(value, str) else said(value)) for name, value in pairs if value is not None]


def _load_lines(result: SAEResult, metadata: dict[str, Any]) -> str:
    lines = ["import torch", 'found = torch.load("feature_activations.pt")  # a row a text: feature_activations, texts']
    exports = metadata["exports"]
    if exports["sae"] == "SAELens":
        lines += ["", "from sae_lens import SAE", 'sae = SAE.load_from_disk("sae")  # the folder beside report/']
        lines += [f"features = sae.encode(x)  # x: {result.hook_site}, float32 [rows, {result.input_dim}]"]
    if exports["sparsify"] == "EleutherAI sparsify":
        lines += ["", "from sparsify import SparseCoder", 'coder = SparseCoder.load_from_disk("sparsify")']
    reasons = [f"# {folder}/: {why}" for folder, why in exports.items() if why not in FORMATS]
    lines += ["", *reasons] if reasons else []
    return "\n".join(lines)


def _request_json(material: Material, metadata: dict[str, Any]) -> str:
    request = json.loads(material.request.to_json())
    both = {"request": request, "used": metadata["sae_config"]}
    return shown_lines(json.dumps(both, indent=2, ensure_ascii=False))


def shown_lines(text: str) -> str:
    """The text with its own line ends, each line safe."""
    return "\n".join(shown(line, 2000) for line in text.split("\n"))


def _write(folder: Path, page: Page) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "index.html") as partial_file:
        partial_file.write_text(rendered(page), encoding="utf-8")


def _write_pictures(folder: Path, result: SAEResult, panels: Sequence[Panel]) -> None:
    if panels:
        write_curves(folder / "curves.png", panels)
    if result.metrics.firing_histogram:
        title, below = f"{result.name}: firing density", "share of all rows on which a feature is active, from"
        write_bars(folder / "density.png", title, below, FIRING, result.metrics.firing_histogram)
