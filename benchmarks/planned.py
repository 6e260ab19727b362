"""The memory that a job was planned to take beside the most that its process held: jobs as different as may be.

The plan is made from shapes before any weight is read, and is what a lease is granted by. Each job runs as the worker
does it, in a new process; the kernel's own figure of that process' peak is compared (`VmHWM`).
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.one_job import done, spec_of
from mistudio_schemas import BatchTopKSAE, GatedSAE, JumpReLUSAE, StandardSAE, TopKSAE, TrainRequested
from mistudio_train.cli.demo_inputs import passages, smollm2_folder

RESULTS: Final = Path(__file__).parent / "results" / "planned.json"
LIMIT: Final = 0.1
"""By which share of what was held the plan may be wrong."""
PASSAGES: Final = 300
SHORT: Final[dict[str, Any]] = {"layer_number": 9, "pooling": "token", "token_budget": 20_000}
NO_LOSS: Final[dict[str, Any]] = {"cross_entropy_tokens": 0}
JOBS: Final[dict[str, dict[str, Any]]] = {
    "batchtopk, m 2,048, with the model's loss": SHORT | {"sae": BatchTopKSAE(k=16, hidden_dim=2048)},
    "topk, m 16,384": SHORT | NO_LOSS | {"sae": TopKSAE(k=32, hidden_dim=16_384, batch_size=2048)},
    "jumprelu, m 8,192, B 4,096": SHORT | NO_LOSS | {"sae": JumpReLUSAE(hidden_dim=8192, batch_size=4096)},
    "gated, m 4,096, B 2,048": SHORT | NO_LOSS | {"sae": GatedSAE(hidden_dim=4096, batch_size=2048)},
    "standard, m 8,192": SHORT | NO_LOSS | {"sae": StandardSAE(hidden_dim=8192)},
    "topk, m 512, last block, mean-pooled": NO_LOSS | {"layer_number": 29, "sae": TopKSAE(k=8, hidden_dim=512)},
    "four of m 4,096 in one job": SHORT
    | NO_LOSS
    | {"saes": [BatchTopKSAE(name=f"k{k}", k=k, hidden_dim=4096) for k in (8, 16, 32, 64)]},
}


@dataclass(frozen=True)
class Compared:
    """A job's plan and its process' peak, in bytes."""

    job: str
    planned: int
    held: int

    @property
    def error(self) -> float:
        """Of the plan, as a share of what was held; above zero too much was planned."""
        return self.planned / self.held - 1


def compare(name: str, fields: dict[str, Any], model: Path, corpus: Path) -> Compared:
    """Do a job."""
    with tempfile.TemporaryDirectory(dir=corpus.parent) as folder:
        request = TrainRequested(
            model_name=str(model), corpus_file=corpus.name, max_sequence_length=256, max_epochs=1, **fields
        )
        spec = spec_of(request, corpus, Path(folder))
        finished = done(spec)
        metadata = json.loads((spec.output / "metadata.json").read_text())
        planned = metadata["memory_optimizations_applied"]["planned_bytes"]
        return Compared(name, planned, finished.memory_peak_bytes)


def show(compared: list[Compared], console: Console) -> None:
    """The table that the README quotes."""
    table = Table("job", "planned", "held", "error")
    for one in compared:
        table.add_row(one.job, f"{one.planned / 1e9:.2f} GB", f"{one.held / 1e9:.2f} GB", f"{one.error:+.0%}")
    console.print(table)
    console.print(machine())


def main(arguments: list[str] | None = None) -> int:
    """Compare all jobs; 1 when a plan is too far off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=RESULTS, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    console = Console(width=110, highlight=False)
    compared = []
    with tempfile.TemporaryDirectory(prefix="mistudio-planned-") as folder:
        corpus, model = Path(folder) / "corpus.txt", smollm2_folder()
        corpus.write_text("\n".join(passages(PASSAGES)) + "\n")
        for name, fields in JOBS.items():
            compared.append(compare(name, fields, model, corpus))
            console.print(f"{name}: {compared[-1].error:+.0%}")
    show(compared, console)
    figures = {"machine": machine(), "limit": LIMIT, "jobs": [asdict(one) for one in compared]}
    options.to.parent.mkdir(parents=True, exist_ok=True)
    options.to.write_text(json.dumps(figures, indent=2) + "\n")
    return int(any(abs(one.error) > LIMIT for one in compared))


if __name__ == "__main__":
    sys.exit(main())
