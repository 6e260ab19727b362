"""The feature store and the report of a large SAE: time, memory and size, for a corpus and for a tenth of it.

Both are made from as many active features as an SAE of that width would have, drawn at random with the frequencies of a
trained one (some features thousands of times as often as others). Memory is the most that a new process holds above
what it held before; it must not grow with the corpus.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.memory import status_of
from mistudio_schemas import CorpusInfo, ModelInfo, RowsInfo, SAEMetrics, SAEResult, TrainRequested

RESULTS: Final = Path(__file__).parent / "results" / "report.json"
D_IN: Final = 576
TEXT_TOKENS: Final = 200
ROWS_AT_ONCE: Final = 512
LIMIT: Final = 1.1
"""By which factor memory may grow while the corpus grows tenfold."""


@dataclass(frozen=True)
class Made:
    """What it took."""

    tokens: int
    latents: int
    entries: int
    store_seconds: float
    store_bytes: int
    store_memory: int
    """Bytes above what the process held before."""
    report_seconds: float
    page_bytes: int
    report_memory: int


def make(tokens: int, latents: int, k: int) -> Made:
    """In a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_make, (tokens, latents, k))


def _make(tokens: int, latents: int, k: int) -> Made:
    from mistudio_train.training.features import feature_store
    from mistudio_train.training.report.gathered import gather
    from mistudio_train.training.report.report import write_report

    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        maxima_F = np.zeros(latents, np.float32)
        path, about = folder / "features" / "activations.parquet", {"pooling": "token"}
        entries = 0

        def store() -> None:
            nonlocal entries
            with feature_store(path, d_sae=latents, max_bytes=10**11, about=about) as made:
                for block in _blocks(tokens, latents, k):
                    made.add(block)
                    np.maximum.at(maxima_F, block.feature.numpy(), block.activation.numpy())
                    entries += len(block.feature)

        store_seconds, store_memory = _measured(store)
        sae, result, material = _report_arguments(folder, tokens, latents, maxima_F)

        def report() -> None:
            gathered = gather(folder, sae, None, material, lambda: None)
            write_report(folder, result, [result], gathered, material, lambda: None)

        report_seconds, report_memory = _measured(report)
        page = (folder / "report" / "index.html").stat().st_size
        size = path.stat().st_size
        return Made(tokens, latents, entries, store_seconds, size, store_memory, report_seconds, page, report_memory)


def _measured(work: Callable[[], None]) -> tuple[float, int]:
    """Seconds, and bytes above what was held before."""
    before = status_of(os.getpid())["VmRSS"]
    # 5: "reset the peak resident set size to the process's current value", proc_pid_clear_refs(5).
    Path(f"/proc/{os.getpid()}/clear_refs").write_text("5")
    began = time.monotonic()
    work()
    return time.monotonic() - began, status_of(os.getpid())["VmHWM"] - before


def _blocks(tokens: int, latents: int, k: int) -> Iterator[Any]:
    from mistudio_train.training.features import RowFeatures

    generator = np.random.default_rng(0)
    weights = (1 / np.arange(1, latents + 1) ** 0.7)[generator.permutation(latents)]
    weights /= weights.sum()
    for first in range(0, tokens, ROWS_AT_ONCE):
        rows = np.arange(first, min(first + ROWS_AT_ONCE, tokens))
        drawn = generator.choice(latents, (len(rows), k), p=weights)
        places = np.unique((np.arange(len(rows))[:, None] * latents + drawn).ravel())
        row, feature = places // latents, places % latents
        yield RowFeatures(
            text=torch.from_numpy(rows // TEXT_TOKENS),
            position=torch.from_numpy(rows % TEXT_TOKENS),
            token_id=torch.from_numpy(generator.integers(0, 40_000, len(rows))),
            row=torch.from_numpy(row),
            feature=torch.from_numpy(feature),
            activation=torch.from_numpy(generator.gamma(2.0, 3.0, len(places)).astype(np.float32)),
        )


def _report_arguments(folder: Path, tokens: int, latents: int, maxima_F: Any) -> tuple[Any, SAEResult, Any]:
    from transformers import AutoTokenizer

    from mistudio_train.cli.demo_inputs import smollm2_folder
    from mistudio_train.sae.folded import FoldedSAE
    from mistudio_train.training.disk import ArrayFile, ArrayWriter
    from mistudio_train.training.report.material import Material
    from mistudio_train.training.texts import Texts, TextsWriter
    from mistudio_train.training.tokens import RowIndex

    generator, texts = np.random.default_rng(1), -(-tokens // TEXT_TOKENS)
    row = np.arange(tokens)

    def array(name: str, values: Any, dtype: type) -> ArrayFile:
        with ArrayWriter(folder / name, dtype) as writer:
            writer.append(values)
        return ArrayFile(folder / name, dtype)

    index = RowIndex(
        array("starts", np.minimum(np.arange(texts + 1) * TEXT_TOKENS, tokens), np.int64),
        array("text", row // TEXT_TOKENS, np.int32),
        array("position", row % TEXT_TOKENS, np.int32),
        array("token", generator.integers(0, 40_000, tokens), np.int32),
    )
    with TextsWriter(folder) as writer:
        writer.append("no text of it is shown")
    weight = torch.randn(D_IN, latents)
    sae = FoldedSAE("topk", weight.T.contiguous(), torch.zeros(latents), weight, torch.zeros(D_IN), k=32)
    metrics = SAEMetrics(**dict.fromkeys(SAEMetrics.model_fields))
    counts = RowsInfo(total=tokens, training=tokens, held_out=0, left_out=0, first_token=0, high_norm=0)
    result = SAEResult(
        name="large", kind="topk", layer_number=9, hook_site="resid_post", input_dim=D_IN, feature_count=latents,
        epochs_trained=1, steps=1, stop_reason="max_epochs", rows=counts, metrics=metrics, prefix="file:///",
    )  # fmt: skip
    rates = (maxima_F > 0).astype(float) * 0.001
    statistics = {"feature_activation_rates": rates.tolist(), "feature_max_activations": maxima_F.tolist()}
    about = {"timestamp": "", "sae_config": {}, "training_results": {}, "exports": {"sae": "SAELens", "sparsify": ""}}
    (folder / "metadata.json").write_text(json.dumps(about | {"feature_statistics": statistics}))
    model = ModelInfo(
        model_name="m", actual_model_loaded="m", architecture="llama", total_layers=30, selected_layer=9,
        hidden_size=D_IN, vocab_size=49_152, requires_token=False,
    )  # fmt: skip
    request = TrainRequested(model_name="m", corpus_file="c.txt", pooling="token")
    corpus = CorpusInfo(texts=texts, tokens=tokens, rows=tokens, sha256="0" * 64)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    material = Material(
        "j", "0", request, model, None, corpus, Texts(folder), index, tokenizer, torch.device("cpu"), []
    )
    return sae, result, material


def show(made: list[Made], console: Console) -> None:
    """The table that the README quotes."""
    table = Table("tokens", "entries", "store: seconds", "MB", "memory", "report: seconds", "MB", "memory")
    for one in made:
        table.add_row(
            f"{one.tokens:,}", f"{one.entries:,}", f"{one.store_seconds:.0f}", f"{one.store_bytes / 1e6:.0f}",
            f"{one.store_memory / 1e6:.0f} MB", f"{one.report_seconds:.0f}", f"{one.page_bytes / 1e6:.1f}",
            f"{one.report_memory / 1e6:.0f} MB",
        )  # fmt: skip
    console.print(table)
    console.print(f"{made[0].latents:,} latents. {machine()}")


def main(arguments: list[str] | None = None) -> int:
    """Make both; 1 if memory grew with the corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--latents", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--to", type=Path, default=RESULTS, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    made = [make(tokens, options.latents, options.k) for tokens in (options.tokens // 10, options.tokens)]
    show(made, Console(width=120, highlight=False))
    options.to.write_text(json.dumps({"machine": machine(), "made": [asdict(one) for one in made]}, indent=2) + "\n")
    small, large = made
    grown = max(large.store_memory / small.store_memory, large.report_memory / small.report_memory)
    return int(grown > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
