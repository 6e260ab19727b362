"""What `demo` ends with: how good the SAE is, ten of its features in context, its files, and how to load it.

Owns the words on the screen and the JSON object that says the same; chooses nothing. Loads neither torch nor a model.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from mistudio_schemas import TrainCompleted

from .display import number, results
from .feature_view import Context, FeatureView
from .finished import PAGE


@dataclass(frozen=True)
class Outcome:
    """What there is to show."""

    event: TrainCompleted
    features: list[FeatureView]
    folder: Path
    """Of the run's files."""


def show(outcome: Outcome) -> None:
    """For a person."""
    out, event, folder = results(), outcome.event, outcome.folder
    _line(out, "")
    _line(out, quality(event))
    _line(out, "")
    _line(out, "Features that look nameable: chosen on one half of the texts, shown from the other half.")
    for feature in outcome.features:
        _line(out, "")
        _line(out, f"feature {feature.feature}: {', '.join(feature.words)}", "bold")
        _line(out, f"  active on {feature.frequency:.2%} of the words, strongest where marked:", "dim")
        for context in feature.contexts:
            out.print(Text("  ").append_text(context.rich()), highlight=False)
    if not outcome.features:
        _line(out, "None passed: too few texts, or too little training.")
    _line(out, "")
    _line(out, f"The files: {folder}")
    _line(out, f"The report, to open in a browser: {folder / PAGE}")
    _line(out, "To load it in SAELens:")
    for line in saelens(event, folder):
        _line(out, f"    {line}")


def quality(event: TrainCompleted) -> str:
    """What was trained on what, and how good it is, in a paragraph."""
    sae, metrics = event.saes[0], event.saes[0].metrics
    loss, l0, fvu, dead = (
        number(one) for one in (metrics.final_loss, metrics.l0, metrics.fvu, metrics.never_active_share)
    )
    judged = f"{metrics.rows:,} held-out tokens" if metrics.held_out else "the tokens that it was trained on"
    losses = metrics.cross_entropy
    recovered = "" if losses is None else f" · {number(losses.recovered_zero)} of the cross-entropy recovered"
    return (
        f"{sae.feature_count} features ({sae.kind}) of {Path(event.model_info.model_name).name}, block "
        f"{sae.layer_number}, {sae.hook_site}: {event.corpus.tokens:,} tokens of {event.corpus.texts:,} texts, "
        f"{sae.epochs_trained} passes, {event.duration_seconds:.0f} s on {event.device}\n"
        f"loss {loss} · {dead} of the features dead · on {judged}:\n"
        f"L0 {l0} active features a token · FVU {fvu} of the variance unexplained{recovered}"
    )


def saelens(event: TrainCompleted, folder: Path) -> list[str]:
    """Three lines of Python."""
    sae = event.saes[0]
    x = f"{sae.hook_site} of block {sae.layer_number}, float32 [tokens, {sae.input_dim}]"
    return [
        "from sae_lens import SAE",
        f"sae = SAE.load_from_disk({str(folder / 'sae')!r})",
        f"features = sae.encode(x)  # x: {x}",
    ]


def print_json(outcome: Outcome) -> None:
    """The same for a program, as one object on a line."""
    event = outcome.event
    said = {
        "job_id": event.job_id,
        "model": event.model_info.model_dump(mode="json"),
        "corpus": event.corpus.model_dump(mode="json"),
        "sae": event.saes[0].model_dump(mode="json", exclude={"prefix"}),
        "duration_seconds": event.duration_seconds,
        "device": event.device,
        "features": [feature_json(feature) for feature in outcome.features],
        "folder": str(outcome.folder),
        "report": str(outcome.folder / PAGE),
        "files": [artifact.name for artifact in event.artifacts],
        "saelens": saelens(event, outcome.folder),
    }
    typer.echo(json.dumps(said, ensure_ascii=False, allow_nan=False))


def feature_json(feature: FeatureView) -> dict[str, object]:
    """A feature and its contexts."""
    return {
        "feature": feature.feature,
        "score": feature.score,
        "frequency": feature.frequency,
        "words": feature.words,
        "contexts": [context_json(context) for context in feature.contexts],
    }


def context_json(context: Context) -> dict[str, object]:
    """A context, with its marked words by strength."""
    marked = [{"word": piece.text, "strength": piece.strength} for piece in context.pieces if piece.strength]
    return {"text": context.text, "activation": context.activation, "marked": context.marked, "words": marked}


def _line(out: Console, text: str, style: str = "") -> None:
    out.print(text, style=style, markup=False, highlight=False)
