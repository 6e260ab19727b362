"""How an SAE is trained, apart from its formulas: one record of numbers that the trainer follows, whatever the kind.

Owns the learning rate's schedule and the rule for ending early; must not know kinds, requests or tensors.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

Precision = Literal["auto", "float32", "bfloat16"]

StopReason = Literal["max_epochs", "training_rows", "min_loss", "no_improvement", "stopped"]
"""The first two: all that was asked for; `stopped`: somebody wanted the SAE as it was."""


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run."""

    learning_rate: float
    """Adam's step size, at its peak."""
    batch_size: int
    """Rows a step; the last batch of an epoch holds what is left."""
    max_epochs: int
    """Passes over the rows."""
    dead_after_rows: int
    """A latent is dead after this many rows without being active."""
    warmup: float = 0.0
    """Share of the steps over which the learning rate rises from zero."""
    decay: float = 0.0
    """Share of the steps at the end over which it falls to zero."""
    grad_clip: float | None = None
    """Upper bound of the norm of the gradient, of the loss summed over a row's dimensions; `None`: none."""
    adam_eps: float = 1e-8
    """What Adam adds to the root of a gradient's mean square: it must be small beside gradients that were clipped."""
    precision: Precision = "float32"
    """What the operands of products of whole batches are rounded to; `auto`: bfloat16 where a GPU computes in it."""
    reinitialize_dead_every: int = 0
    """Epochs between re-initialisations of rarely active latents, none in the last ten epochs; 0: never."""
    training_rows: int | None = None
    """Rows to train on in all, if the last pass is not a whole one; `None`: it is."""
    resample_at: tuple[float, ...] = ()
    """Shares of the steps after which dead latents begin anew as what is reconstructed worst."""
    held_out_patience: int | None = None
    """End after this many epochs in a row without a new lowest FVU on held-out rows; `None`: never for this reason."""
    min_loss: float | None = None
    """End after an epoch whose mean loss is below this; `None`: never for this reason."""
    patience: int | None = None
    """End after this many epochs in a row without a new lowest mean loss; `None`: never for this reason."""

    def total_steps(self, rows: int) -> int:
        """Steps of the whole run, if it is not ended early."""
        whole, rest = divmod(self.training_rows or self.max_epochs * rows, rows)
        return whole * math.ceil(rows / self.batch_size) + math.ceil(rest / self.batch_size)

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """The learning rate of a step counted from 0: linear up, flat, linear down; never quite zero."""
        warmup_steps, decay_steps = round(self.warmup * total_steps), round(self.decay * total_steps)
        rising = (step + 1) / warmup_steps if step < warmup_steps else 1.0
        left = total_steps - step
        falling = left / decay_steps if left < decay_steps else 1.0
        return self.learning_rate * min(rising, falling)

    def resamples_before(self, step: int, total_steps: int) -> bool:
        """Whether dead latents begin anew before a step counted from 0."""
        return any(step == round(share * total_steps) for share in self.resample_at)

    def reinitializes_after(self, epoch: int) -> bool:
        """Whether rarely active latents are re-initialised after so many epochs."""
        every = self.reinitialize_dead_every
        return every > 0 and epoch % every == 0 and epoch <= self.max_epochs - 10


class EarlyStopping:
    """Decides after each epoch whether training ends, by the recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._loss, self._held_out = _Lowest(), _Lowest()

    def after(self, epochs: int, mean_loss: float, held_out_fvu: float | None = None) -> StopReason | None:
        """Told the figures of an epoch, with the number of epochs made; the first reason that holds, else `None`."""
        recipe = self._recipe
        self._loss.see(mean_loss)
        if held_out_fvu is not None:
            self._held_out.see(held_out_fvu)
        if recipe.min_loss is not None and mean_loss < recipe.min_loss:
            return "min_loss"
        if self._loss.waits_for(recipe.patience) or self._held_out.waits_for(recipe.held_out_patience):
            return "no_improvement"
        if epochs < recipe.max_epochs:
            return None
        return "training_rows" if recipe.training_rows else "max_epochs"

    def state_dict(self) -> dict[str, Any]:
        """What `after` has learned so far."""
        return {"loss": vars(self._loss).copy(), "held_out": vars(self._held_out).copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._loss, self._held_out = _Lowest(**state["loss"]), _Lowest(**state["held_out"])


@dataclass
class _Lowest:
    """The lowest of the values seen, and how many were seen since."""

    value: float = math.inf
    since: int = 0

    def see(self, value: float) -> None:
        lower = value < self.value
        self.value, self.since = (value, 0) if lower else (self.value, self.since + 1)

    def waits_for(self, patience: int | None) -> bool:
        return patience is not None and self.since >= patience
