"""The sink for Weights & Biases: one run there for each of ours, with metrics `sae/event/figure` over `sae/event/step`.

Nothing but these and the request is sent: no console, no source, no machine.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from .sink import Line, NewLines, Outcome, Shown

# a worker asks nobody for a key at its terminal, and tells nobody of its errors whom the operator has not named
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

import wandb


class WandbRun:
    """A run of W&B's, new or gone on with; where it goes to, and as whom, the library's own `WANDB_…` say.

    Args:
        project: its name.
        folder: for the library's files, and in offline mode for the run.
        shown: the run.

    """

    def __init__(self, project: str, folder: Path, shown: Shown) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=project,
            dir=folder,
            id=shown.name,
            name=shown.name,
            config=shown.params,
            resume="allow",
            reinit="create_new",
            settings=settings,
        )
        self._new = NewLines(self._last_step)

    def write(self, lines: Sequence[Line]) -> None:
        """Log the figures of each line together."""
        for line in self._new.among(lines):
            self._run.log({f"{line.curve}/{name}": value for name, value in line.figures.items()})

    def close(self, outcome: Outcome) -> None:
        """Wait until all is sent, however long that takes."""
        self._run.finish(exit_code=0 if outcome == "finished" else 1)

    def _last_step(self, curve: str) -> float | None:
        """Of a curve that comes for the first time, which has W&B draw it over its own steps."""
        self._run.define_metric(f"{curve}/step")
        self._run.define_metric(f"{curve}/*", step_metric=f"{curve}/step")
        step: float | None = self._run.summary.get(f"{curve}/step")  # type: ignore[no-untyped-call]
        return step
