"""The most memory that the training of one SAE takes, of every kind and in several shapes, beside what is planned.

Each in a new process, which takes some steps on random rows on a CPU and does nothing else. The numbers in
`mistudio_train.training.memory_plan.COPIES_CPU` are fitted to these; `--fit` does that again.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import lsq_linear  # type: ignore[import-untyped]

from benchmarks.machine import machine
from benchmarks.memory import status_of
from mistudio_schemas import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    SAEConfig,
    StandardSAE,
    TopKSAE,
    TrainRequested,
)
from mistudio_train.training.memory_plan import STEP_BYTES, Copies, sae_training_bytes

KINDS: Final[dict[str, Callable[..., SAEConfig]]] = {
    "topk": TopKSAE,
    "batchtopk": BatchTopKSAE,
    "matryoshka": MatryoshkaSAE,
    "jumprelu": JumpReLUSAE,
    "gated": GatedSAE,
    "standard": StandardSAE,
    "decoder_norm": lambda **fields: StandardSAE(penalty="decoder_norm", **fields),
}
SHAPES: Final = (
    (576, 2048, 1024),
    (576, 4096, 2048),
    (576, 8192, 4096),
    (576, 16_384, 64),
    (576, 16_384, 1024),
    (128, 8192, 2048),
)
"""Width of a row, latents, rows a step."""
STEPS: Final = 12
"""After so many no kind takes more."""
ONE_OF_EACH: Final = (Copies(1, 0, 0), Copies(0, 1, 0), Copies(0, 0, 1))
BASE: Final = 900.0
"""MB of the process besides, that errors are weighed with: it is the whole that is planned."""


@dataclass(frozen=True)
class Taken:
    """One training."""

    kind: str
    d: int
    m: int
    batch: int
    megabytes: float

    @property
    def matrices(self) -> list[float]:
        """Megabytes of the three of `Copies`, once."""
        return [copies.bytes(self.d, self.m, self.batch) / 1e6 for copies in ONE_OF_EACH]

    @property
    def planned(self) -> float:
        """Megabytes."""
        return sae_training_bytes(KINDS[self.kind](), self.d, self.m, self.batch, on_cpu=True) / 1e6


def take(kind: str, d: int, m: int, batch: int) -> Taken:
    """Train in a new process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return Taken(kind, d, m, batch, pool.apply(megabytes_of, (kind, d, m, batch)))


def megabytes_of(kind: str, d: int, m: int, batch: int) -> float:
    """Of the training, above what the process held before."""
    import torch

    from mistudio_train.sae.build import build_sae, recipe_for, settled
    from mistudio_train.sae.trainer import Trainer
    from mistudio_train.training.allocator import freed_memory_kept, give_back
    from mistudio_train.training.fit import SAMPLE_ROWS

    batches = [torch.randn(batch, d) for _ in range(2)]

    def train(config: SAEConfig, steps: int) -> None:
        rows = steps * batch
        request = TrainRequested(model_name="m", corpus_file="c.txt", pooling="token", max_epochs=1, sae=config)
        config = settled(request.resolved_saes()[0], rows=rows, mean_pooled=False)
        recipe = recipe_for(config, rows=rows, mean_pooled=False)
        trainer = Trainer(build_sae(config, d), recipe, rows=rows, device="cpu", seed=0)
        trainer.prepare(sample_ND)
        with freed_memory_kept():
            for number in range(steps):
                trainer.step(batches[number % 2])

    sample_ND = torch.randn(SAMPLE_ROWS, d)
    common: dict[str, Any] = {"batch_size": batch, "seed": 0}
    train(TopKSAE(hidden_dim=64, k=8, **common), 2)  # for the libraries' own memory
    give_back()
    before = status_of(os.getpid())["VmRSS"]
    # 5: "reset the peak resident set size to the process's current value", proc_pid_clear_refs(5).
    Path(f"/proc/{os.getpid()}/clear_refs").write_text("5")
    train(KINDS[kind](hidden_dim=m, **common), STEPS)
    return (status_of(os.getpid())["VmHWM"] - before) / 1e6


def fitted(taken: list[Taken]) -> tuple[float, float, float]:
    """The copies that are nearest to what was taken, in the least squares of the whole process' relative errors."""
    weights = np.array([1 / (BASE + one.megabytes) for one in taken])
    held = np.array([one.megabytes - STEP_BYTES / 1e6 for one in taken])
    matrices = np.array([one.matrices for one in taken])
    # weights, gradients and Adam's moments are four
    found = lsq_linear(matrices * weights[:, None], held * weights, bounds=([4, 0.5, 0], np.inf)).x
    return float(found[0]), float(found[1]), float(found[2])


def main(arguments: list[str] | None = None) -> int:
    """Train all, and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--fit", action="store_true", help="show what the plan's numbers would be")
    options = parser.parse_args(arguments)
    console = Console(width=110, highlight=False)
    table = Table("kind", "width", "latents", "rows", "taken", "planned", "error of the process' whole")
    for kind in options.kinds:
        taken = [take(kind, *shape) for shape in SHAPES]
        for one in taken:
            error = (one.planned - one.megabytes) / (BASE + one.megabytes)
            megabytes = f"{one.megabytes:.0f} MB", f"{one.planned:.0f} MB"
            table.add_row(one.kind, f"{one.d:,}", f"{one.m:,}", f"{one.batch:,}", *megabytes, f"{error:+.0%}")
        if options.fit:
            console.print(f"{kind}: {', '.join(f'{copies:.1f}' for copies in fitted(taken))}")
    console.print(table)
    console.print(machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())
