"""Trains one SAE on stored activations: reads batches, steps, saves, measures, logs and reports.

Joins the store of rows to the trainer; knows no kind, no file but the log, and nothing of other SAEs.
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mistudio_schemas import ErrorCode, SAEConfig
from mistudio_train.errors import JobError, TrainingDiverged
from mistudio_train.messages import LeftEarly
from mistudio_train.sae.base import sides
from mistudio_train.sae.build import build_sae, recipe_for, settled
from mistudio_train.sae.figures import EpochFigures, StepFigures
from mistudio_train.sae.folded import FoldedSAE
from mistudio_train.sae.recipe import Recipe
from mistudio_train.sae.statistics import FeatureStatistics
from mistudio_train.sae.trainer import Trainer

from .allocator import freed_memory_kept
from .reporter import Reporter
from .training_log import TrainingLog

SMALL_STEP_FLOP = 500_000_000
"""A step on a CPU with less arithmetic than this is faster on one thread, by far when other work wants the cores."""
SAMPLE_ROWS = 8192
"""Rows that an SAE sees before its first step, to find scale and centre."""
SLOWER = 0.3
"""Share of the learning rate with which training tries again when it has diverged."""
HELD_OUT_ROWS = 4096
"""So many are enough for a curve."""
HELD_OUT_POINTS, LEAST_STEPS_BETWEEN = 20, 50
"""Of the curve; a point costs about as much as a step."""
JUDGED_AT_ONCE = 1 << 22
"""Numbers in fp32 that are held at once while a point is made: activations, and rows with what is made of them."""
JUDGED_COPIES = 16
"""Of rows: eight in double precision."""


class Rows(Protocol):
    """What training needs of the rows that it trains on."""

    @property
    def rows(self) -> int:
        """How many there are."""
        ...

    @property
    def d_in(self) -> int:
        """The width of what the SAE reads; of a transcoder's rows, which have what it predicts beside, the half."""
        ...

    def sample(self, count: int) -> Tensor:
        """So many of them at most, from everywhere: [N, width], on the CPU, in any float type."""
        ...

    def batches(self, epoch: int, size: int, start: int = 0) -> Generator[Tensor]:
        """An epoch's rows from the place `start` of its order on: [B, width] each."""
        ...


class Kept(Protocol):
    """Where the training of one SAE is kept, for the attempt that goes on should this one end."""

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        ...

    def load(self) -> dict[str, Any] | None:
        """What was saved last, `None` if nothing was; the log is as it was then."""
        ...

    def save(self, state: dict[str, Any]) -> None:
        """Save the state, and the log with it."""
        ...


@dataclass(frozen=True)
class HeldOutFigures:
    """How good an SAE was on rows that it is not trained on, after so many steps."""

    step: int
    fvu: float | None
    l0: float | None
    cosine: float | None


@dataclass(frozen=True)
class Fitted:
    """A trained SAE and how it came about."""

    sae: FoldedSAE
    config: SAEConfig
    """With every default filled in."""
    recipe: Recipe
    epochs: list[EpochFigures]
    steps: int
    seconds: float
    rate: float
    """Share of the recipe's learning rate that it ended with; below 1 if training had diverged before."""
    held_out: list[HeldOutFigures]

    @property
    def stop_reason(self) -> str:
        """`max_epochs`, `min_loss`, `no_improvement` or `stopped`."""
        return self.epochs[-1].stop_reason or "max_epochs"

    @property
    def final_loss(self) -> float:
        """Mean loss of the last epoch, whose weights these are."""
        return self.epochs[-1].loss


class FailedBefore(JobError):
    """An earlier attempt has seen this SAE fail, and kept that: it would go the same way again."""


class NothingTrained(Exception):
    """Training was stopped before its first step."""


def fit(
    config: SAEConfig,
    rows: Rows,
    held_out: Tensor | None,
    *,
    mean_pooled: bool,
    device: torch.device,
    reporter: Reporter,
    log_path: Path,
    kept: Kept,
    steps_after: int = 0,
    start: Callable[[], FoldedSAE] | None = None,
) -> Fitted:
    """Train the SAE that `config` (resolved) names, from where it was saved last if it was.

    If training diverges, it goes back to where it was saved last and tries again, once, at a lower learning rate.

    Args:
        config: of `TrainRequested.resolved_saes()`.
        rows: its activations.
        held_out: some that it is not trained on, fp32 [N, width], by which it is judged on the way.
        mean_pooled: whether a row is a text.
        device: to train on.
        reporter: in the phase `training`; its share is this SAE's.
        log_path: of the log, which gets a line a measurement and a line an epoch.
        kept: where to save.
        steps_after: of the SAEs still to come, for the estimate of the time left.
        start: reads what it begins as, where that is a trained SAE.

    Raises:
        TrainingDiverged: if it did so again.
        FailedBefore: if `{"failed": …}` was kept of it.
        LeftEarly: if the parent wants the child to leave; all is saved.
        NothingTrained: if the parent wants an end before there was a step.
    """
    config = settled(config, rows=rows.rows, mean_pooled=mean_pooled)
    recipe = recipe_for(config, rows=rows.rows, mean_pooled=mean_pooled)
    name, again = config.name or config.kind, False
    while True:
        trainer = Trainer(build_sae(config, rows.d_in), recipe, rows=rows.rows, device=device, seed=config.seed or 0)
        state = kept.load()
        if state is not None and "failed" in state:
            failed = state["failed"]
            raise FailedBefore(failed["message"], failed["hint"], ErrorCode(failed["code"]))
        flop = 12 * recipe.batch_size * rows.d_in * trainer.sae.d_sae
        with TrainingLog(log_path, partial(reporter.logged, name)) as log, _threads_for(flop), freed_memory_kept():
            watch = _Watch(trainer, reporter, log, name, held_out, steps_after)
            fitting = _Fitting(trainer, rows, kept, reporter, watch, start)
            try:
                fitting.begin(state, SLOWER if again else None)
                fitting.run()
            except TrainingDiverged as error:
                if trainer.rate < 1:
                    raise
                reporter.warn(f"{name}: {error} It goes on from its last checkpoint at {SLOWER:g} of the learning rate")
                again = True
                continue
        sae = trainer.sae.folded().to("cpu")
        return Fitted(sae, config, recipe, fitting.epochs, trainer.steps, watch.seconds, trainer.rate, watch.curve)


class _Fitting:
    """A training under way, which can end after any step."""

    def __init__(
        self,
        trainer: Trainer,
        rows: Rows,
        kept: Kept,
        reporter: Reporter,
        watch: "_Watch",
        start: Callable[[], FoldedSAE] | None,
    ) -> None:
        self._trainer, self._rows, self._kept, self._reporter, self._watch = trainer, rows, kept, reporter, watch
        self._start = start
        self.epochs: list[EpochFigures] = []

    def begin(self, state: dict[str, Any] | None, rate: float | None) -> None:
        """From what `_save` saved, or anew; with another share of the learning rate, if one is given."""
        if state is None:
            start = None if self._start is None else self._start()
            self._trainer.prepare(self._rows.sample(SAMPLE_ROWS), start)
        else:
            self._trainer.load_state_dict(state["trainer"])
            self.epochs = [EpochFigures(**figures) for figures in state["epochs"]]
            self._watch.go_on(state["seconds"], state["curve"])
        if rate is not None:
            self._trainer.rate = rate

    def run(self) -> None:
        """Until training is over, or the parent wants its end."""
        if self._over:
            return
        while not self._over:
            self._run_epoch()
        self._save()

    @property
    def _over(self) -> bool:
        return bool(self.epochs) and self.epochs[-1].stop_reason is not None

    def _run_epoch(self) -> None:
        trainer = self._trainer
        with closing(self._rows.batches(trainer.epoch, trainer.recipe.batch_size, trainer.rows_done)) as batches:
            for rows_BD in batches:
                if self._ended_by_wish():
                    return
                if trainer.is_over:
                    break
                trainer.step(rows_BD)
                self._watch.after_step()
                if self._kept.due:
                    self._save()
        self._close(trainer.end_epoch(self._watch.held_out_fvu()))

    def _ended_by_wish(self) -> bool:
        """Whether the parent wants the SAE as it is now; it wants it whole, so this never ends within a step."""
        wish = self._reporter.wish
        if wish == "leave":
            if self._trainer.steps:
                self._save()
            raise LeftEarly
        if wish is None:
            return False
        if not self._trainer.steps:
            raise NothingTrained
        if self._trainer.rows_done:
            self._close(self._trainer.stop())
        else:  # between two epochs
            self.epochs[-1] = replace(self.epochs[-1], stop_reason="stopped", reinitialized=0)
        return True

    def _close(self, figures: EpochFigures) -> None:
        self.epochs.append(figures)
        self._watch.after_epoch(figures)

    def _save(self) -> None:
        self._trainer.refuse_non_finite()
        self._kept.save(
            {
                "trainer": self._trainer.state_dict(),
                "epochs": [asdict(figures) for figures in self.epochs],
                "seconds": self._watch.seconds,
                "curve": [asdict(figures) for figures in self._watch.curve],
            }
        )


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

    def __init__(
        self,
        trainer: Trainer,
        reporter: Reporter,
        log: TrainingLog,
        name: str,
        held_out: Tensor | None,
        steps_after: int,
    ) -> None:
        self._trainer, self._reporter, self._log, self._name = trainer, reporter, log, name
        self._held_out, self._steps_after = held_out, steps_after
        self._judged_every = max(LEAST_STEPS_BETWEEN, -(-trainer.total_steps // HELD_OUT_POINTS))
        self._began = time.monotonic()
        self.curve: list[HeldOutFigures] = []

    @property
    def seconds(self) -> float:
        """Of training, earlier attempts' included."""
        return time.monotonic() - self._began

    def go_on(self, seconds: float, curve: list[dict[str, Any]]) -> None:
        """An earlier attempt has trained for so long, and measured this."""
        self._began = time.monotonic() - seconds
        self.curve = [HeldOutFigures(**figures) for figures in curve]

    def after_step(self) -> None:
        steps = self._trainer.steps
        if self._held_out is not None and (not steps % self._judged_every or steps == self._trainer.total_steps):
            self.curve.append(_judged(self._trainer, self._held_out))
            self._log.write(event="held_out", seconds=round(self.seconds, 3), **asdict(self.curve[-1]))
        if self._reporter.due and (figures := self._trainer.measure()) is not None:
            self._log.write(event="step", seconds=round(self.seconds, 3), **asdict(figures))
            self._report(figures)

    def after_epoch(self, figures: EpochFigures) -> None:
        self._log.write(event="epoch", seconds=round(self.seconds, 3), step=self._trainer.steps, **asdict(figures))

    def held_out_fvu(self) -> float | None:
        """Now, where it decides when training ends."""
        if self._held_out is None or self._trainer.recipe.held_out_patience is None:
            return None
        return _judged(self._trainer, self._held_out).fvu

    def _report(self, figures: StepFigures) -> None:
        trainer, rows_done = self._trainer, self._trainer.epoch * self._trainer.rows + self._trainer.rows_done
        per_step = self.seconds / trainer.steps
        left = trainer.total_steps - trainer.steps + self._steps_after
        self._reporter.say(
            trainer.steps / trainer.total_steps,
            f"training {self._name}: epoch {figures.epoch + 1} of {trainer.recipe.max_epochs}",
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
            held_out_fvu=self.curve[-1].fvu if self.curve else None,
            held_out_l0=self.curve[-1].l0 if self.curve else None,
        )


@torch.no_grad()
def _judged(trainer: Trainer, held_out: Tensor) -> HeldOutFigures:
    """The SAE as it is now, on these rows."""
    sae = trainer.sae
    statistics = FeatureStatistics(sae.d_sae, sae.d_in, trainer.device)
    for rows_BD in held_out.split(max(1, JUDGED_AT_ONCE // (sae.d_sae + JUDGED_COPIES * sae.d_in))):  # type: ignore[no-untyped-call]
        x_BD, y_BD = sides(rows_BD.to(trainer.device), sae.d_in)
        acts_BF = sae.encode(x_BD)
        statistics.update(x_BD if y_BD is None else y_BD, sae.decode(acts_BF), acts_BF)
    metrics = statistics.metrics()
    return HeldOutFigures(trainer.steps, metrics.fvu, metrics.l0, metrics.cosine)
