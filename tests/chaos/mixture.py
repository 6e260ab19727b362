"""What is asked for: requests of several kinds, a corpus for them and a tiny model, in a short and a long form."""

from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics as help_texts
from typing import Any, Literal

from tests.models import tiny_model

CORPUS = "corpus.txt"
LAYERS = 2


@dataclass(frozen=True)
class Size:
    """How much work a job is."""

    texts: int
    mean_epochs: int
    token_epochs: int
    session_seconds: int
    """Of silence, after which a worker has left its group."""


SIZES = {"short": Size(40, 60, 5, 3), "long": Size(400, 1500, 38, 6)}


def make_inputs(folder: Path, size: Size) -> None:
    """The model and the corpus."""
    tiny_model("llama", folder / "model", num_hidden_layers=LAYERS)
    paragraphs = (one.replace("\n", " ") for text in help_texts.values() for one in text.split("\n\n"))
    texts = [one for one in paragraphs if 40 < len(one) < 400]
    (folder / CORPUS).write_text("\n".join(texts[: size.texts]) + "\n")


def mixture(folder: Path, size: Size) -> dict[str, dict[str, Any]]:
    """Name to request, without a job's id."""

    def request(pooling: Literal["mean", "token"], **fields: Any) -> dict[str, Any]:
        base = {"model_name": str(folder / "model"), "corpus_file": CORPUS, "layer_number": 1}
        epochs = size.mean_epochs if pooling == "mean" else size.token_epochs
        return {
            **base,
            "pooling": pooling,
            "hidden_dim": 64,
            "max_epochs": epochs,
            "min_loss": 0,
            "max_sequence_length": 64,
            **fields,
        }

    topk = {"kind": "topk", "k": 8, "batch_size": 128}
    standard = {"kind": "standard", "batch_size": 64}
    return {
        "mean-standard": request("mean", seed=1),
        "mean-topk": request("mean", sae=topk, seed=2),
        "token-topk": request("token", sae=topk, seed=3),
        "token-standard": request("token", sae=standard, batch_size=64, seed=4),
        "two": request(
            "token",
            saes=[topk | {"kind": "batchtopk", "name": "first"}, standard | {"name": "second", "layer_number": 0}],
            max_epochs=max(1, size.token_epochs // 2),
            seed=5,
        ),
        "other-seed": request("token", sae=topk, seed=6),
    }
