"""Trains one SAE by a recipe, batch by batch, and can stop after any step and go on elsewhere bit for bit.

Owns the optimiser, schedule, counters and generators; must not read rows from anywhere, and never asks for the kind.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import kernels
from .base import RARE_BELOW, SparseAutoencoder, StepInput, sides
from .figures import Divergence, EpochFigures, Late, StepFigures, Sums, diverged
from .folded import FoldedSAE
from .recipe import EarlyStopping, Precision, Recipe
from .replay import Replay

COUNT_DEAD_EVERY = 16
"""Steps between two looks of a GPU whether any latent is dead: without, there is no auxiliary loss to be computed."""


class Trainer:
    """Call `prepare` once; then for every epoch `step` with batches of all the rows, and `end_epoch`.

    A row is as wide as the SAE's input; where what is to be reconstructed is another row, both lie side by side.

    What the seed leaves open about re-initialisation is decided here: the frequency is counted over the epoch's own
    steps, in training; it happens by the recipe's `reinitialize_dead_every`, never once training is over; and Adam's
    moments of the latents concerned begin again at zero.
    """

    def __init__(
        self, sae: SparseAutoencoder, recipe: Recipe, *, rows: int, device: torch.device | str, seed: int
    ) -> None:
        """Move `sae` to `device`, to be trained on `rows` rows an epoch; `seed` fixes all draws."""
        self.sae = sae.to(device)
        self.recipe = recipe
        self.rows = rows
        self.device = torch.device(device)
        self.sae.operands = _operands(recipe.precision, self.device)
        self.seed = seed
        self.total_steps = recipe.total_steps(rows)
        self.steps = 0
        """Steps made."""
        self.epoch = 0
        """The epoch in progress, from 0; the number of epochs made."""
        self._parameters = list(sae.parameters())
        on_gpu = self.device.type == "cuda"
        self._optimizer = torch.optim.Adam(
            _groups(sae), lr=recipe.learning_rate, eps=recipe.adam_eps, fused=True, capturable=on_gpu
        )
        self._step_now: Tensor | None = torch.zeros((), device=self.device) if on_gpu else None
        # cuSPARSE, which is there without the kernels, has not been seen to be recorded
        self._replay = Replay(self._update) if on_gpu and kernels.AVAILABLE else None
        self._generator = torch.Generator().manual_seed(_derived_seed(seed))
        self.rate = 1.0
        """Share of the recipe's learning rate that is used."""
        self._divergence = Divergence(self.device)
        self._late_dead = Late()
        self._any_dead = True
        """Unless seen otherwise on a GPU, some steps ago."""
        self._stopping = EarlyStopping(recipe)
        self._epoch_sums, self._recent_sums = Sums(self.device), Sums(self.device)
        self._active_rows_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=self.device)
        self._rows_since_active_F = torch.zeros_like(self._active_rows_F)
        self._to_reinitialize_F: Tensor | None = None
        """Before the next step, if there is one: an SAE that is stopped now is not delivered with fresh latents."""

    @property
    def rows_done(self) -> int:
        """Rows of the epoch in progress that were trained on."""
        return self._epoch_sums.rows

    @property
    def is_over(self) -> bool:
        """Whether all steps are made."""
        return self.steps >= self.total_steps

    def prepare(self, rows_ND: Tensor, start: FoldedSAE | None = None) -> None:
        """Show the SAE a first sample of rows, before any step, and let it begin as `start`; not after resuming.

        Raises:
            CannotStart: if the SAE's kind cannot be what `start` is.
        """
        self.sae.prepare(rows_ND.to(self.device))
        if start is not None:
            self.sae.start_from(start.to(self.device))

    def step(self, rows_BD: Tensor) -> None:
        """One update from a batch of rows, on any device and in any float type. Does not wait for the device.

        Raises:
            TrainingDiverged: within a hundred steps of the loss' being no number, or far above where it began.
        """
        self._reinitialize()
        rows_BD = rows_BD.to(self.device, torch.float32, non_blocking=True)
        self._resample(rows_BD)
        self._set_rates()
        (self._replay or self._update)(rows_BD, self._revives())
        for sums in (self._epoch_sums, self._recent_sums):
            sums.rows += len(rows_BD)
        self.steps += 1
        self._divergence.look(self.steps)

    def _update(self, rows_BD: Tensor, revives: bool) -> None:
        """All of a step that a device does, and nothing else: on a GPU it is recorded and repeated."""
        step = self.steps if self._step_now is None else self._step_now
        dead_F = self._dead_latents() if revives else None
        x_BD, y_BD = sides(rows_BD, self.sae.d_in)
        output = self.sae.step(StepInput(x_BD, step, self.total_steps, dead_F, y_BD))
        self._optimizer.zero_grad(set_to_none=True)
        output.loss.backward()  # type: ignore[no-untyped-call]
        self.sae.before_update()
        if self.recipe.grad_clip is not None:  # which is of a sum over dimensions, and the loss is their mean
            torch.nn.utils.clip_grad_norm_(self._parameters, self.recipe.grad_clip / self.sae.d_in)
        self._optimizer.step()
        self.sae.after_update()
        self._count(output.active_rows_F, len(x_BD))
        self._epoch_sums.add(output, len(x_BD))
        self._recent_sums.add(output, len(x_BD))
        self._divergence.add(output)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step counted from 0."""
        return self.rate * self.recipe.learning_rate_at(step, self.total_steps)

    def measure(self) -> StepFigures | None:
        """Figures of the steps since the last call, `None` if there were none. Waits for the device: call it rarely.

        Raises:
            TrainingDiverged: if the loss is NaN or infinite.
        """
        if self._recent_sums.rows == 0:
            return None
        means = self._recent_sums.means(self.steps)
        self._recent_sums.clear()
        return StepFigures(
            step=self.steps,
            epoch=self.epoch,
            **means,
            dead_share=_share(self._rows_since_active_F >= self.recipe.dead_after_rows),
            learning_rate=self.learning_rate_at(self.steps - 1),
        )

    def end_epoch(self, held_out_fvu: float | None = None) -> EpochFigures:
        """Close the epoch: its figures, whether training ends, and fresh weights for rarely active latents when due.

        Args:
            held_out_fvu: on rows that it is not trained on, where the recipe ends training by it.

        Raises:
            TrainingDiverged: if the loss or a weight is NaN or infinite.
            ValueError: if the epoch's rows were not all trained on, or more than once, and there are steps left.
        """
        if self.rows_done != self.rows and not self.is_over:
            raise ValueError(f"the epoch has {self.rows} rows, {self.rows_done} were trained on")
        return self._close_epoch(held_out_fvu)

    def stop(self) -> EpochFigures:
        """End training in the middle of an epoch, some rows of which were trained on: the figures are of these.

        Raises:
            TrainingDiverged: if the loss or a weight is NaN or infinite.
        """
        return self._close_epoch(stop=True)

    def _close_epoch(self, held_out_fvu: float | None = None, *, stop: bool = False) -> EpochFigures:
        rows, means = self.rows_done, self._epoch_sums.means(self.steps)
        self.refuse_non_finite()
        self.epoch += 1
        stop_reason = "stopped" if stop else self._stopping.after(self.epoch, means["loss"], held_out_fvu)
        rare_F = self._active_rows_F < RARE_BELOW * rows
        if stop_reason is None and self.recipe.reinitializes_after(self.epoch):
            self._to_reinitialize_F = rare_F
        figures = EpochFigures(
            epochs=self.epoch,
            **means,
            fraction_active=means["l0"] / self.sae.d_sae,
            dead_share=_share(self._active_rows_F == 0),
            rarely_active_share=_share(rare_F),
            reinitialized=0 if self._to_reinitialize_F is None else int(rare_F.sum()),
            stop_reason=stop_reason,
        )
        self._epoch_sums.clear()
        self._active_rows_F.zero_()
        return figures

    def refuse_non_finite(self) -> None:
        """See that what would be saved can be gone on from. Waits for the device.

        Raises:
            TrainingDiverged: if a weight is NaN or infinite.
        """
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self._parameters):
            raise diverged(f"a weight is no number by step {self.steps}")

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors and plain values only, for a loader that refuses pickles.

        Refers to the live tensors: write it, or copy it, before the next step.
        """
        return {
            "sae": self.sae.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rate": self.rate,
            "divergence": self._divergence.state_dict(),
            "late_dead": self._late_dead.state_dict(),
            "any_dead": self._any_dead,
            "stopping": self._stopping.state_dict(),
            "epoch_sums": self._epoch_sums.state_dict(),
            "recent_sums": self._recent_sums.state_dict(),
            "generator": self._generator.get_state(),
            "active_rows_F": self._active_rows_F,
            "rows_since_active_F": self._rows_since_active_F,
            "to_reinitialize_F": self._to_reinitialize_F,
            "steps": self.steps,
            "epoch": self.epoch,
            "rows": self.rows,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()` of a trainer made with the same arguments, as if it had never stopped.

        Raises:
            ValueError: if that trainer had other rows or another seed.
        """
        if (state["rows"], state["seed"]) != (self.rows, self.seed):
            raise ValueError(
                f"the checkpoint is of {state['rows']} rows and seed {state['seed']}, not {self.rows} and {self.seed}"
            )
        self.sae.load_state_dict(state["sae"])
        self._load_optimizer(state["optimizer"])
        self.rate = state["rate"]
        self._divergence.load_state_dict(state["divergence"])
        self._late_dead.load_state_dict(state["late_dead"])
        self._any_dead = state["any_dead"]
        self._stopping.load_state_dict(state["stopping"])
        self._epoch_sums.load_state_dict(state["epoch_sums"])
        self._recent_sums.load_state_dict(state["recent_sums"])
        self._generator.set_state(state["generator"].cpu())
        self._active_rows_F.copy_(state["active_rows_F"])
        self._rows_since_active_F.copy_(state["rows_since_active_F"])
        which_F = state["to_reinitialize_F"]
        self._to_reinitialize_F = None if which_F is None else which_F.to(self.device)
        self.steps, self.epoch = state["steps"], state["epoch"]

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)
        for group in self._optimizer.param_groups:  # as the device wants it, not the one that it was saved on
            group["lr"], group["capturable"] = self.recipe.learning_rate, self.device.type == "cuda"
        if self._replay is not None:
            self._replay.forget()

    def _set_rates(self) -> None:
        """Of this step; on a GPU, and so with the step's number, in tensors that stay where they are."""
        if self._step_now is not None:
            self._step_now.fill_(self.steps)
        for group in self._optimizer.param_groups:
            rate = group["rate"] * self.learning_rate_at(self.steps)
            if self._step_now is None:
                group["lr"] = rate
            elif isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = torch.full_like(self._step_now, rate)

    def _dead_latents(self) -> Tensor:
        return self._rows_since_active_F >= self.recipe.dead_after_rows

    @property
    def _can_be_dead(self) -> bool:
        return self.epoch * self.rows + self.rows_done >= self.recipe.dead_after_rows

    def _revives(self) -> bool:
        """Not while no latent can be dead, or a GPU's last look at them, some steps ago, has seen none that is."""
        if self.device.type != "cuda" or not self._can_be_dead:
            return self._can_be_dead
        if self.steps % COUNT_DEAD_EVERY == 0:
            self._any_dead = self._late_dead.read(self._dead_latents().sum()) != 0
        return self._any_dead

    def _count(self, active_rows_F: Tensor, rows: int) -> None:
        self._active_rows_F += active_rows_F
        self._rows_since_active_F += rows
        self._rows_since_active_F.masked_fill_(active_rows_F > 0, 0)

    def _reinitialize(self) -> None:
        which_F, self._to_reinitialize_F = self._to_reinitialize_F, None
        if which_F is not None:
            self.sae.reset_latents(which_F, self._generator)
            self._begin_anew(which_F)

    def _resample(self, rows_BD: Tensor) -> None:
        if self._can_be_dead and self.recipe.resamples_before(self.steps, self.total_steps):
            self._begin_anew(self.sae.resample(self._dead_latents(), rows_BD, self._generator))

    def _begin_anew(self, which_F: Tensor) -> None:
        """Without the moments and the age of what these latents were."""
        for parameter in self.sae.by_latent:
            moments = self._optimizer.state[parameter]
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name][which_F] = 0
        self._rows_since_active_F[which_F] = 0


def _operands(precision: Precision, device: torch.device) -> torch.dtype:
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def _groups(sae: SparseAutoencoder) -> list[dict[str, Any]]:
    """The parameters by the rate that they take, relative to the learning rate."""
    rates = sae.relative_rates()
    by_rate: dict[float, list[Tensor]] = {}
    for parameter in sae.parameters():
        by_rate.setdefault(rates.get(parameter, 1.0), []).append(parameter)
    return [{"params": parameters, "rate": rate} for rate, parameters in by_rate.items()]


def _share(which_F: Tensor) -> float:
    return float(which_F.double().mean())


def _derived_seed(seed: int) -> int:
    """A stream of its own: with the seed itself, re-initialising would draw the first weights again."""
    return int(np.random.SeedSequence((seed, 1)).generate_state(1, np.uint64)[0])
