"""Twelve SAEs in one job beside the same twelve as a job each: three kinds in four sizes, at two layers.

SmolLM2-135M on passages of English. Each job is done as the worker does it, in a new process: model, extraction,
training, figures, files. With one job the model is loaded and the corpus read once, for both layers; the SAEs are the
same, bit for bit, which is compared.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.one_job import done, spec_of
from mistudio_schemas import BatchTopKSAE, JumpReLUSAE, SAEConfig, TopKSAE, TrainRequested
from mistudio_train.cli.demo_inputs import passages, smollm2_folder
from mistudio_train.messages import Finished

RESULTS: Final = Path(__file__).parent / "results" / "sweep.json"
PASSAGES: Final = 400
KINDS: Final[tuple[Callable[..., SAEConfig], ...]] = (TopKSAE, BatchTopKSAE, JumpReLUSAE)
SIZES: Final = {512: 6, 1024: 9, 2048: 6, 4096: 9}
"""Latents, and the layer that they are of."""


def saes() -> list[SAEConfig]:
    """All twelve."""
    made = []
    for kind in KINDS:
        for size, layer in SIZES.items():
            sparsity: dict[str, Any] = {"target_l0": 32} if kind is JumpReLUSAE else {"k": 32}
            sae = kind(hidden_dim=size, layer_number=layer, batch_size=1024, seed=0, **sparsity)
            made.append(sae.model_copy(update={"name": f"{sae.kind}-{size}-{layer}"}))
    return made


def job(some: list[SAEConfig], corpus: Path, model: Path) -> tuple[float, Finished]:
    """Seconds of the whole, and what came of it."""
    request = TrainRequested(
        model_name=str(model),
        corpus_file=corpus.name,
        pooling="token",
        max_sequence_length=256,
        max_epochs=1,
        cross_entropy_tokens=0,
        saes=some,
    )
    with tempfile.TemporaryDirectory(dir=corpus.parent) as folder:
        began = time.perf_counter()
        finished = done(spec_of(request, corpus, Path(folder)))
        return time.perf_counter() - began, finished


def main(arguments: list[str] | None = None) -> int:
    """Do all jobs; 1 if an SAE differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=PASSAGES, help="of the corpus")
    parser.add_argument("--to", type=Path, default=RESULTS, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    console = Console(width=100, highlight=False)
    wanted = saes()
    with tempfile.TemporaryDirectory(prefix="mistudio-sweep-") as folder:
        corpus, model = Path(folder) / "corpus.txt", smollm2_folder()
        corpus.write_text("\n".join(passages(options.passages)) + "\n")
        together, sweep = job(wanted, corpus, model)
        console.print(f"twelve SAEs in one job: {together:.0f} s")
        alone: dict[str, float] = {}
        different = []
        for one, in_sweep in zip(wanted, sweep.saes, strict=True):
            seconds, finished = job([one], corpus, model)
            alone[str(one.name)] = seconds
            console.print(f"{one.name} in a job of its own: {seconds:.0f} s")
            if finished.saes[0].metrics != in_sweep.metrics:
                different.append(one.name)
    table = Table("twelve SAEs", "seconds")
    table.add_row("in one job", f"{together:.0f}")
    table.add_row("in twelve", f"{sum(alone.values()):.0f}")
    console.print(table)
    console.print(f"{sum(alone.values()) / together:.2f} times as fast, {sweep.corpus.rows:,} tokens. {machine()}")
    figures = {"machine": machine(), "tokens": sweep.corpus.rows, "together": together, "alone": alone}
    options.to.write_text(json.dumps(figures, indent=2) + "\n")
    if different:
        console.print(f"not the same SAE: {', '.join(map(str, different))}")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
