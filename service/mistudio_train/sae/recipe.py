"""How an SAE is trained, apart from its formulas: one record of numbers that the trainer follows, whatever the kind.

Owns the learning rate's schedule and the rule for ending early; must not know kinds, requests or tensors.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

StopReason = Literal["max_epochs", "min_loss", "no_improvement", "stopped"]
"""`stopped`: somebody asked for the SAE as it was."""


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
    """Upper bound of the gradient's norm; `None`: none."""
    reinitialize_dead_every: int = 0
    """Epochs between re-initialisations of rarely active latents, none in the last ten epochs; 0: never."""
    min_loss: float | None = None
    """End after an epoch whose mean loss is below this; `None`: never for this reason."""
    patience: int | None = None
    """End after this many epochs in a row without a new lowest mean loss; `None`: never for this reason."""

    def total_steps(self, rows: int) -> int:
        """Steps of the whole run, if it is not ended early."""
        return self.max_epochs * math.ceil(rows / self.batch_size)

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """The learning rate of a step counted from 0: linear up, flat, linear down; never quite zero."""
        warmup_steps, decay_steps = round(self.warmup * total_steps), round(self.decay * total_steps)
        rising = (step + 1) / warmup_steps if step < warmup_steps else 1.0
        left = total_steps - step
        falling = left / decay_steps if left < decay_steps else 1.0
        return self.learning_rate * min(rising, falling)

    def reinitializes_after(self, epoch: int) -> bool:
        """Whether rarely active latents are re-initialised after so many epochs."""
        every = self.reinitialize_dead_every
        return every > 0 and epoch % every == 0 and epoch <= self.max_epochs - 10


class EarlyStopping:
    """Decides after each epoch whether training ends, by the recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._best = math.inf
        self._without_improvement = 0

    def after(self, epochs: int, mean_loss: float) -> StopReason | None:
        """Told the mean loss of an epoch, with the number of epochs made; the first reason that holds, else `None`."""
        if mean_loss < self._best:
            self._best, self._without_improvement = mean_loss, 0
        else:
            self._without_improvement += 1
        if self._recipe.min_loss is not None and mean_loss < self._recipe.min_loss:
            return "min_loss"
        if self._recipe.patience is not None and self._without_improvement >= self._recipe.patience:
            return "no_improvement"
        return "max_epochs" if epochs >= self._recipe.max_epochs else None

    def state_dict(self) -> dict[str, Any]:
        """What `after` has learned so far."""
        return {"best": self._best, "without_improvement": self._without_improvement}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._best, self._without_improvement = state["best"], state["without_improvement"]
