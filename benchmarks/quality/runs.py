"""Trainings that are kept: each is one line of a file, and one that is there is not done again.

Owns that file and the order of a training's steps; which trainings there are is decided elsewhere.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

import mistudio_train
from benchmarks.machine import machine
from benchmarks.quality.data import SHAPES, data_of
from benchmarks.quality.figures import Figures, figures_of
from benchmarks.quality.sides import Run, trained
from mistudio_train.errors import TrainingDiverged

BY_THRESHOLD: Final = ("batchtopk", "matryoshka")
"""Kinds that are delivered with one threshold for all latents."""


class NotThere(Exception):
    """A training that was not done yet is asked for, and none may be done."""


class Runs:
    """Gives the figures of a training.

    Args:
        path: of the file.
        train: whether to train what is not there.
        say: told of each new training.
    """

    def __init__(self, path: Path, *, train: bool, say: Callable[[str], None]) -> None:
        self._path, self._train, self._say = path, train, say
        self._known: dict[Run, Figures] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            record = json.loads(line)
            self._known[Run(**{name: record[name] for name in Run.__dataclass_fields__})] = record["figures"]

    def __call__(self, run: Run) -> Figures:
        """From the file, or trained now; empty where training diverged.

        Raises:
            NotThere: if it is not in the file and nothing may be trained.
        """
        if run not in self._known:
            if not self._train:
                raise NotThere
            began = time.perf_counter()
            figures = _figures(run)
            self._keep(run, figures, time.perf_counter() - began)
        return self._known[run]

    def _keep(self, run: Run, figures: Figures, seconds: float) -> None:
        record = asdict(run) | {"seconds": round(seconds, 1), "figures": figures, "versions": versions()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._known[run] = figures
        found = f"FVU {figures['fvu']:.4f} at L0 {figures['l0']:.1f}" if figures else "diverged"
        coefficient = "" if run.coefficient is None else f" coefficient {run.coefficient:.4g}"
        self._say(
            f"{run.data} {run.kind} {run.side} lr {run.lr:g}{coefficient} seed {run.seed}: {found}, {seconds:.0f} s"
        )


def _figures(run: Run) -> Figures:
    shape = SHAPES[run.data]
    data = data_of(run.data, run.seed, run.steps)
    try:
        sae = trained(run, data, shape)
        threshold_for = shape.k if run.kind in BY_THRESHOLD else None
        return figures_of(sae, data, threshold_for, splice=run.seed > 0)
    except TrainingDiverged:
        return {}


def versions() -> dict[str, Any]:
    """Of all that a figure depends on; our trainer's also by its source."""
    folder = Path(mistudio_train.__file__).parent / "sae"
    source = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return {
        "mistudio_train": mistudio_train.__version__,
        "sae_source": hashlib.sha256(source).hexdigest()[:12],
        "sae_lens": version("sae-lens"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": machine(),
    }
