"""Trains one SAE on stored activations: reads batches, steps, measures, logs and reports.

Joins the store of rows to the trainer; knows no kind, no file but the log, and nothing of other SAEs.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mistudio_schemas import StandardSAE, TopKSAE
from mistudio_train.sae.build import build_sae, recipe_for
from mistudio_train.sae.figures import EpochFigures, StepFigures
from mistudio_train.sae.folded import FoldedSAE
from mistudio_train.sae.recipe import Recipe
from mistudio_train.sae.trainer import Trainer

from .reporter import Reporter
from .training_log import TrainingLog

SMALL_STEP_FLOP = 500_000_000
"""A step on a CPU with less arithmetic than this is faster on one thread, by far when other work wants the cores."""
SAMPLE_ROWS = 8192
"""Rows that an SAE sees before its first step, to find scale and centre."""


class Rows(Protocol):
    """What training needs of stored activations."""

    @property
    def rows(self) -> int:
        """How many there are."""
        ...

    @property
    def d_in(self) -> int:
        """Their width."""
        ...

    def gather(self, indices: NDArray[np.int64]) -> Tensor:
        """The rows of these numbers, fp32 [B, d_in]."""
        ...


@dataclass(frozen=True)
class Fitted:
    """A trained SAE and how it came about."""

    sae: FoldedSAE
    recipe: Recipe
    epochs: list[EpochFigures]
    steps: int
    seconds: float

    @property
    def stop_reason(self) -> str:
        """`max_epochs`, `min_loss` or `no_improvement`."""
        return self.epochs[-1].stop_reason or "max_epochs"

    @property
    def final_loss(self) -> float:
        """Mean loss of the last epoch, whose weights these are."""
        return self.epochs[-1].loss


def fit(
    config: StandardSAE | TopKSAE,
    rows: Rows,
    *,
    mean_pooled: bool,
    device: torch.device,
    reporter: Reporter,
    log: TrainingLog,
    steps_after: int = 0,
) -> Fitted:
    """Train the SAE that `config` (resolved) names.

    Args:
        config: of `TrainRequested.resolved_saes()`.
        rows: its activations.
        mean_pooled: whether a row is a text.
        device: to train on.
        reporter: in the phase `training`; its share is this SAE's.
        log: takes a line a measurement and a line an epoch.
        steps_after: of the SAEs still to come, for the estimate of the time left.

    Raises:
        TrainingDiverged: if the loss is no number.
    """
    recipe = recipe_for(config, rows=rows.rows, mean_pooled=mean_pooled)
    seed = config.seed or 0
    trainer = Trainer(build_sae(config, rows.d_in), recipe, rows=rows.rows, device=device, seed=seed)
    trainer.prepare(rows.gather(np.sort(trainer.order(0).at(0, SAMPLE_ROWS))))
    watch = _Watch(trainer, reporter, log, config.name or config.kind, steps_after)
    epochs: list[EpochFigures] = []
    with _threads_for(12 * recipe.batch_size * rows.d_in * (config.hidden_dim or 0)):
        while not epochs or epochs[-1].stop_reason is None:
            for batch in trainer.batches():
                trainer.step(rows.gather(batch))
                watch.after_step()
            epochs.append(trainer.end_epoch())
            watch.after_epoch(epochs[-1])
    return Fitted(trainer.sae.folded().to("cpu"), recipe, epochs, trainer.steps, watch.seconds)


@contextmanager
def _threads_for(flop: int) -> Iterator[None]:
    """One thread for small steps, whose threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    if flop < SMALL_STEP_FLOP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Watch:
    """Measures when it is time to, for the log and the reporter alike."""

    def __init__(self, trainer: Trainer, reporter: Reporter, log: TrainingLog, name: str, steps_after: int) -> None:
        self._trainer, self._reporter, self._log, self._name = trainer, reporter, log, name
        self._steps_after = steps_after
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since training began."""
        return time.monotonic() - self._began

    def after_step(self) -> None:
        if self._reporter.due and (figures := self._trainer.measure()) is not None:
            self._log.write(event="step", seconds=round(self.seconds, 3), **asdict(figures))
            self._report(figures)

    def after_epoch(self, figures: EpochFigures) -> None:
        self._log.write(event="epoch", seconds=round(self.seconds, 3), step=self._trainer.steps, **asdict(figures))

    def _report(self, figures: StepFigures) -> None:
        trainer, rows_done = self._trainer, self._trainer.epoch * self._trainer.rows + self._trainer.rows_done
        per_step = self.seconds / trainer.steps
        left = trainer.total_steps - trainer.steps + self._steps_after
        self._reporter.say(
            trainer.steps / trainer.total_steps,
            f"training {self._name}: epoch {figures.epoch + 1} of {trainer.recipe.max_epochs}",
            sae=self._name,
            step=trainer.steps,
            total_steps=trainer.total_steps,
            tokens_done=rows_done,
            tokens_per_second=rows_done / self.seconds,
            estimated_time_remaining=round(left * per_step),
            current_epoch=figures.epoch + 1,
            current_loss=figures.loss,
            reconstruction_loss=figures.reconstruction_loss,
            sparsity_loss=figures.sparsity_loss,
            l0=figures.l0,
            dead_share=figures.dead_share,
        )
