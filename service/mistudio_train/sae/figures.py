"""Sums of what training steps say, kept on the device, and the plain numbers that people and programs read.

Owns the averaging over rows and the check that a loss is a number; must not know what is trained or how.
"""

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from mistudio_train.errors import TrainingDiverged

from .base import StepOutput
from .recipe import StopReason


@dataclass(frozen=True)
class StepFigures:
    """Means over the rows of the steps since the last measurement."""

    step: int
    """Steps made so far."""
    epoch: int
    """The epoch they belong to, from 0."""
    loss: float
    reconstruction_loss: float
    sparsity_loss: float
    l0: float
    """Mean number of active latents a row."""
    dead_share: float
    """Share of the latents that count as dead by the recipe, now."""
    learning_rate: float
    """Of the last step."""


@dataclass(frozen=True)
class EpochFigures:
    """Means over all rows of one epoch, each row as its step saw it."""

    epochs: int
    """Epochs made, this one included."""
    loss: float
    reconstruction_loss: float
    sparsity_loss: float
    l0: float
    """Mean number of active latents a row."""
    fraction_active: float
    """l0 / d_sae: what the seed calls sparsity."""
    dead_share: float
    """Share of the latents that were active on no row of the epoch."""
    rarely_active_share: float
    """Share of the latents that were active on less than 1% of its rows: dead by the seed's frequency threshold."""
    reinitialized: int
    """Latents given fresh weights after it."""
    stop_reason: StopReason | None
    """Why training ends here; `None`: it goes on."""


class Sums:
    """Row-weighted sums of the four scalars of `StepOutput`: adding never waits for the device, reading does."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.rows = 0
        """What the sums are divided by: whoever adds counts them here, too."""

    def add(self, output: StepOutput, rows: int) -> None:
        """Add what a step over so many rows says."""
        scalars = torch.stack((output.loss, output.reconstruction_loss, output.sparsity_loss, output.l0))
        self._sums.add_(scalars.detach().double(), alpha=rows)

    def means(self, step: int) -> dict[str, float]:
        """The four means by their names, at least one step having been counted.

        Raises:
            TrainingDiverged: if the loss is NaN or infinite; `step` says where that was seen.
        """
        sums = self._sums.tolist()
        if not torch.isfinite(self._sums).all():
            raise diverged(f"the loss is {sums[0] / self.rows} by step {step}")
        names = ("loss", "reconstruction_loss", "sparsity_loss", "l0")
        return {name: total / self.rows for name, total in zip(names, sums, strict=True)}

    def clear(self) -> None:
        """Begin again from nothing."""
        self._sums.zero_()
        self.rows = 0

    def state_dict(self) -> dict[str, Any]:
        """The sums so far."""
        return {"sums": self._sums, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._sums.copy_(state["sums"])
        self.rows = state["rows"]


class Late:
    """Reads numbers without making the device wait: each time, the one of the time before."""

    def __init__(self) -> None:
        self._coming: tuple[Tensor, torch.cuda.Event] | None = None
        self._arrived: float | None = None
        """The last one, where it is known already."""

    def read(self, number: Tensor) -> float | None:
        """Ask for a 0-d tensor's number; given the last one that was asked for, on a CPU this one."""
        if not number.is_cuda:
            return number.item()
        before = self._waited_for()
        on_its_way = torch.empty((), dtype=number.dtype, pin_memory=True)
        on_its_way.copy_(number, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._coming, self._arrived = (on_its_way, event), None
        return before

    def state_dict(self) -> dict[str, Any]:
        """The number on its way; waits for it."""
        return {"arrived": self._waited_for()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """It is the next one that is given."""
        self._coming, self._arrived = None, state["arrived"]

    def _waited_for(self) -> float | None:
        if self._coming is not None:
            number, event = self._coming
            event.synchronize()
            self._coming, self._arrived = None, number.item()
        return self._arrived


class Divergence:
    """Notices that the loss is no number any more, or far above where it began, without making the device wait.

    A GPU's number is read when the next one is due, so what happens is noticed within twice `EVERY` steps.
    """

    EVERY: Final = 50
    """Steps between two looks."""
    FACTOR: Final = 10.0
    """The mean reconstruction loss of so many steps is at most so many times that of the first ones."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._first: float | None = None
        self._late = Late()

    def add(self, output: StepOutput) -> None:
        """Add what a step says."""
        self._sum += output.reconstruction_loss.detach()

    def look(self, steps: int) -> None:
        """After so many steps, each of which was added.

        Raises:
            TrainingDiverged: saying by which step.
        """
        if steps % self.EVERY:
            return
        mean = self._late.read(self._sum / self.EVERY)
        self._sum.zero_()
        if mean is None:
            return
        if not math.isfinite(mean) or (self._first is not None and mean > self.FACTOR * max(self._first, 1e-12)):
            began = "" if self._first is None else f", {self._first:.3g} in the beginning"
            raise diverged(f"the reconstruction loss is {mean:.3g} by step {steps}{began}")
        if self._first is None:
            self._first = mean

    def state_dict(self) -> dict[str, Any]:
        """What has been seen."""
        return {"sum": self._sum, "first": self._first, "late": self._late.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._sum.copy_(state["sum"])
        self._first = state["first"]
        self._late.load_state_dict(state["late"])


def diverged(what: str) -> TrainingDiverged:
    """The error for a loss or a weight that is no number."""
    return TrainingDiverged(f"Training diverged: {what}.", "Lower learning_rate, or look for infinite activations.")
