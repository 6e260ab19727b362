"""Training one SAE on rows in memory: what it does when training diverges, and the curve of its held-out rows."""

import copy
import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mistudio_schemas import BatchTopKSAE, StandardSAE, TrainRequested
from mistudio_train.errors import TrainingDiverged
from mistudio_train.messages import ChildMessage, Progress, Warned
from mistudio_train.sae.figures import Divergence
from mistudio_train.training.fit import SLOWER, Fitted, fit
from mistudio_train.training.reporter import Reporter

from .conftest import Listener

WIDTH, ROWS, BATCH = 16, 2000, 10
ROWS_ND = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


class Rows:
    """Rows in order; `spoil` is told the number of every batch that is given, and may change it."""

    rows, d_in = ROWS, WIDTH

    def __init__(self, spoil: Callable[[int, Tensor], Tensor] = lambda number, x_BD: x_BD) -> None:
        self.given, self._spoil = 0, spoil

    def sample(self, count: int) -> Tensor:
        return ROWS_ND[:count]

    def batches(self, epoch: int, size: int, start: int = 0) -> Generator[Tensor]:
        for x_BD in torch.split(ROWS_ND[start:], size):
            self.given += 1
            yield self._spoil(self.given, x_BD.clone())


class Kept:
    """Keeps in memory, every so many steps."""

    def __init__(self, every: int) -> None:
        self.state: dict[str, Any] | None = None
        self.saved_at: list[int] = []
        self._every, self._asked = every, 0

    @property
    def due(self) -> bool:
        self._asked += 1
        return self._asked % self._every == 0

    def load(self) -> dict[str, Any] | None:
        return copy.deepcopy(self.state)

    def save(self, state: dict[str, Any]) -> None:
        self.state = copy.deepcopy(state)
        self.saved_at.append(state["trainer"]["steps"])


def trained(
    rows: Rows, kept: Kept, folder: Path, held_out: Tensor | None = None, **fields: Any
) -> tuple[Fitted, list[ChildMessage]]:
    config = BatchTopKSAE.model_validate({"k": 4, "batch_size": BATCH, "learning_rate": 1e-3} | fields)
    asked = TrainRequested(model_name="m", corpus_file="c.txt", sae=config, hidden_dim=64, max_epochs=2)
    parent = Listener()
    fitted = fit(
        asked.resolved_saes()[0],
        rows,
        held_out,
        mean_pooled=False,
        device=torch.device("cpu"),
        reporter=Reporter(parent),
        log_path=folder / "log.jsonl",
        kept=kept,
    )
    return fitted, parent.heard


def nan_once(at: int) -> Callable[[int, Tensor], Tensor]:
    return lambda number, x_BD: x_BD * float("nan") if number == at else x_BD


def test_after_a_divergence_it_goes_on_from_its_last_checkpoint_at_a_lower_rate(tmp_path: Path) -> None:
    rows, kept = Rows(nan_once(330)), Kept(every=100)
    fitted, heard = trained(rows, kept, tmp_path)
    assert (fitted.rate, fitted.steps) == (SLOWER, 400)
    wasted = rows.given - 400
    assert 330 - 300 <= wasted <= 330 - 300 + 2 * Divergence.EVERY, "noticed soon, and the checkpoint was used"
    warnings = [said.message for said in heard if isinstance(said, Warned)]
    assert len(warnings) == 1
    assert "diverged" in warnings[0]
    assert "goes on from its last checkpoint at 0.3 of the learning rate" in warnings[0]
    assert all(torch.isfinite(weight).all() for weight in (fitted.sae.encoder_weight, fitted.sae.decoder_weight))


def test_without_a_checkpoint_it_begins_anew(tmp_path: Path) -> None:
    rows = Rows(nan_once(20))
    fitted, _ = trained(rows, Kept(every=10**9), tmp_path)
    assert (fitted.rate, fitted.steps) == (SLOWER, 400)
    assert rows.given <= 400 + 2 * Divergence.EVERY


def test_what_has_diverged_is_never_saved(tmp_path: Path) -> None:
    kept = Kept(every=1)
    trained(Rows(nan_once(330)), kept, tmp_path)
    assert kept.saved_at[:329] == list(range(1, 330))
    assert kept.saved_at[329] == 330  # from the one before it, again


def test_the_second_divergence_is_the_last(tmp_path: Path) -> None:
    rows = Rows(lambda number, x_BD: x_BD * float("nan") if number > 120 else x_BD)
    with pytest.raises(TrainingDiverged, match=r"by step 1\d\d"):
        trained(rows, Kept(every=100), tmp_path)
    assert rows.given <= 2 * 2 * Divergence.EVERY + 120


def test_an_attempt_that_goes_on_after_a_divergence_has_no_second_try(tmp_path: Path) -> None:
    kept = Kept(every=10)
    trained(Rows(nan_once(120)), kept, tmp_path / "first")
    assert kept.state is not None
    assert kept.state["trainer"]["rate"] == SLOWER
    kept.state["trainer"] |= {"epoch": 0, "steps": 0}
    kept.state["epochs"] = []
    rows = Rows(lambda number, x_BD: x_BD * float("nan"))
    with pytest.raises(TrainingDiverged):
        trained(rows, kept, tmp_path / "second")
    assert rows.given <= 2 * Divergence.EVERY


def test_a_loss_that_grows_without_end_is_a_divergence_though_every_number_is_finite(tmp_path: Path) -> None:
    grows = Rows(lambda number, x_BD: x_BD * (30 if 100 < number <= 200 else 1))
    fitted, heard = trained(grows, Kept(every=10**9), tmp_path)
    assert fitted.rate == SLOWER
    assert any(isinstance(said, Warned) and "in the beginning" in said.message for said in heard)


def test_a_seeds_job_that_learns_is_none(tmp_path: Path) -> None:
    asked = TrainRequested(model_name="m", corpus_file="c.txt", sae=StandardSAE(), hidden_dim=64, max_epochs=3)
    fitted = fit(
        asked.resolved_saes()[0],
        Rows(),
        None,
        mean_pooled=True,
        device=torch.device("cpu"),
        reporter=Reporter(Listener()),
        log_path=tmp_path / "log.jsonl",
        kept=Kept(10**9),
    )
    assert (fitted.rate, fitted.held_out) == (1.0, [])


def test_the_held_out_curve_is_what_the_sae_does_on_them(tmp_path: Path) -> None:
    held_out = torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(1))
    fitted, heard = trained(Rows(), Kept(every=10**9), tmp_path, held_out)
    assert [point.step for point in fitted.held_out] == list(range(50, 401, 50))
    x_hat = fitted.sae.decode(acts := fitted.sae.encode(held_out))
    last = fitted.held_out[-1]
    centred = held_out - held_out.mean(0)
    assert last.fvu == pytest.approx(float((x_hat - held_out).square().sum() / centred.square().sum()), rel=1e-4)
    assert last.l0 == pytest.approx(float((acts > 1e-6).sum(1).double().mean()))
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["fvu"] for line in logged if line["event"] == "held_out"] == [one.fvu for one in fitted.held_out]
    said = [message for message in heard if isinstance(message, Progress) and message.held_out_fvu is not None]
    assert all(message.held_out_fvu in [one.fvu for one in fitted.held_out] for message in said)


def test_looking_at_held_out_rows_changes_nothing(tmp_path: Path) -> None:
    without, _ = trained(Rows(), Kept(every=10**9), tmp_path / "a")
    watched, _ = trained(Rows(), Kept(every=10**9), tmp_path / "b", torch.randn(30, WIDTH))
    assert torch.equal(without.sae.encoder_weight, watched.sae.encoder_weight)
    assert torch.equal(without.sae.decoder_weight, watched.sae.decoder_weight)


@pytest.mark.parametrize(("wanted", "epochs", "steps"), [(500, 1, 50), (2000, 1, 200), (2505, 2, 251), (4000, 2, 400)])
def test_as_many_rows_are_trained_on_as_asked_for(wanted: int, epochs: int, steps: int, tmp_path: Path) -> None:
    fitted, _ = trained(Rows(), Kept(every=10**9), tmp_path, training_rows=wanted)
    assert (len(fitted.epochs), fitted.steps, fitted.stop_reason) == (epochs, steps, "training_rows")


def test_training_ends_when_held_out_rows_are_not_reconstructed_better(tmp_path: Path) -> None:
    """Rows of noise: what is learned of these is of no use for others."""
    fitted, _ = trained(Rows(), Kept(10**9), tmp_path, torch.randn(500, WIDTH), patience=1, max_epochs=60, k=12)
    assert fitted.stop_reason == "no_improvement"
    assert len(fitted.epochs) < 60
