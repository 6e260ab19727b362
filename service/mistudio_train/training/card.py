"""The model card beside an SAE's weights, `sae/README.md`: what it is, how good it is, and what it was made from.

Owns the card's words and that nothing from a request or a corpus acts in Markdown; must not measure anything.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import ModelCardData

from mistudio_schemas import CorpusInfo, SAEMetrics, SAEResult

from .files import whole
from .report.figures import judged_by, percent, said
from .report.material import Material
from .report.shown import shown

NAME: Final = "README.md"
DATASETS: Final = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")
ACTIVE: Final = re.compile(r"([!-+./:-@\[-`{-~]|(?<!\w)[,-]|[,-](?!\w))")
"""ASCII punctuation: every character that means something in Markdown, and which a backslash makes plain; a comma or a
hyphen within a word never does."""
MOST: Final = 2000
"""Characters of one value."""
OTHERS: Final = {
    "texts_empty": "empty",
    "texts_too_short": "too short",
    "texts_too_long": "too long",
    "texts_beyond_budget": "beyond the token budget",
    "texts_truncated": "cut at the length limit, and used",
}


def write_card(folder: Path, result: SAEResult, material: Material) -> None:
    """Write `sae/README.md`, as a Hugging Face model repository expects it.

    Args:
        folder: of the SAE's files; it has `metadata.json` and `sae/`.
        result: what is said of the SAE.
        material: of the job.

    Raises:
        DiskFull: if the disk has no room.

    """
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    parts = [
        f"---\n{_front_matter(result, material)}\n---",
        f"# {prose(Path(material.model.model_name).name)}: {prose(result.name)}",
        f"A sparse autoencoder ({code(result.kind)}, {result.feature_count:,} latents) of the activations at "
        f"{_site(result)} of {code(material.model.model_name)}, trained by miStudioTrain.",
        *_section("Figures", [judged_by(result.metrics), _table(("Figure", "Value"), figures(result.metrics))]),
        *_section("Load it", [_fenced(_load_lines(result), "python"), *_what_is_x(material)]),
        *_section("Warnings", ["\n".join(f"- {prose(warning)}" for warning in material.warnings)]),
        *_section("Made from", [_table(("What", "Which"), _provenance(result, material, metadata))]),
        *_section("The kind's settings as used", [_fenced(_indented(metadata["sae_config"]), "json")]),
        *_section("The request as accepted", [_fenced(_indented(json.loads(material.request.to_json())), "json")]),
    ]
    with whole(folder / "sae" / NAME) as partial:
        partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def prose(text: str) -> str:
    """The text as Markdown that shows just it, in one line."""
    return ACTIVE.sub(r"\\\1", shown(text, MOST))


def code(text: str) -> str:
    """The text as a code span, in one line; also in a table, where a bar would end the cell even there."""
    plain = shown(text, MOST)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    padding = " " if plain.startswith(("`", " ")) or plain.endswith(("`", " ")) else ""
    return f"{ticks}{padding}{plain}{padding}{ticks}".replace("|", "\\|")


def figures(metrics: SAEMetrics) -> Iterator[tuple[str, str]]:
    """The few that say how good it is, those that are defined."""
    if metrics.fvu is not None:
        yield "FVU: variance not reconstructed", said(metrics.fvu)
    if metrics.l0 is not None:
        yield "L0: active latents a row", said(metrics.l0)
    if metrics.never_active_share is not None:
        yield "Never active: latents, on any row", percent(metrics.never_active_share)
    losses = metrics.cross_entropy
    if losses is not None and losses.recovered_zero is not None:
        yield f"Cross-entropy recovered, {losses.tokens:,} tokens, against zero", percent(losses.recovered_zero)
    if (probing := metrics.probing) is not None:
        most, accuracy = probing.features[-1], probing.balanced_accuracy[-1]
        yield f"Labels of {code(probing.column)} told by {most} features, balanced", percent(accuracy)


def _front_matter(result: SAEResult, material: Material) -> str:
    """A model in a folder or a bucket has no commit, and its name means nothing to the hub. A licence is not known."""
    dataset = DATASETS.match(material.request.corpus_file)
    data = ModelCardData(
        library_name="saelens",
        tags=["sparse-autoencoder", "saelens", "interpretability", result.kind],
        base_model=material.model.model_name if material.revision is not None else None,
        datasets=[dataset[1]] if dataset else None,
    )
    return data.to_yaml(line_break="\n").strip()


def _site(result: SAEResult) -> str:
    read = f"{code(result.hook_site)} of block {result.layer_number}"
    return read if result.predicts is None else f"{read}, from which it predicts {code(result.predicts)},"


def _load_lines(result: SAEResult) -> str:
    folder = 'SAE.load_from_disk(".")  # the folder of this file; of the hub what snapshot_download gives'
    takes = f"x: {result.hook_site} of block {result.layer_number}, float32 [rows, {result.input_dim}]"
    return f"from sae_lens import SAE\nsae = {folder}\nfeatures = sae.encode(x)  # {takes}"


def _what_is_x(material: Material) -> list[str]:
    if not material.whole_texts:
        return []
    return ["It was trained on the means over each text's tokens: give it such means, not single tokens."]


def _provenance(result: SAEResult, material: Material, metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "Model", code(material.model.model_name)
    if material.revision is not None:
        yield "Commit", code(material.revision)
    yield "Site", _site(result).rstrip(",")
    yield from _corpus(material.request.corpus_file, material.corpus)
    if result.rows is not None:
        rows = result.rows
        parts = f"{rows.training:,} trained on, {rows.held_out:,} held out, {rows.left_out:,} left out"
        yield "Rows", f"{rows.total:,}, {'a text each' if material.whole_texts else 'a token each'}: {parts}"
    steps, count = f"{result.steps:,} steps", result.epochs_trained
    passes = f"{count:,} passes" if count != 1 else "1 pass"
    yield "Training", f"{steps}, {passes}, until {code(result.stop_reason)}"
    yield "Seed", f"{metadata['sae_config']['seed']}"
    yield "Device", code(str(metadata["training_results"]["device"]))
    yield "Code", f"miStudioTrain {code(material.version)}, torch {code(str(torch.__version__))}"
    yield "Job", code(material.job_id)


def _corpus(name: str, corpus: CorpusInfo) -> Iterator[tuple[str, str]]:
    yield "Corpus", code(name)
    yield "Corpus sha256", code(corpus.sha256)
    if corpus.commit is not None:
        yield "Corpus commit", code(corpus.commit)
    yield "Corpus size", f"{corpus.texts:,} texts, {corpus.tokens:,} tokens"
    others = [f"{count:,} {why}" for field, why in OTHERS.items() if (count := getattr(corpus, field))]
    if others:
        yield "Other texts", ", ".join(others)


def _section(title: str, parts: Sequence[str]) -> list[str]:
    """Nothing where there is nothing to say."""
    return [f"## {title}", *parts] if any(parts) else []


def _table(head: tuple[str, str], rows: Iterator[tuple[str, str]]) -> str:
    lines = [f"| {name} | {value} |" for name, value in (head, ("---", "---"), *rows)]
    return "\n".join(lines)


def _fenced(text: str, language: str) -> str:
    """Lines that no fence of backticks in them can end."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    safe = "\n".join(shown(line, MOST) for line in text.split("\n"))
    return f"{ticks}{language}\n{safe}\n{ticks}"


def _indented(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
