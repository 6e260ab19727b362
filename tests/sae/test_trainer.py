"""The trainer: resumed equals uninterrupted, figures are means over rows, dead latents start again, NaN is noticed."""

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from mistudio_schemas import BatchTopKSAE, GatedSAE, JumpReLUSAE, MatryoshkaSAE, SAEConfig, StandardSAE, TopKSAE
from mistudio_train.errors import TrainingDiverged
from mistudio_train.sae.build import build_sae
from mistudio_train.sae.figures import EpochFigures
from mistudio_train.sae.recipe import Recipe
from mistudio_train.sae.trainer import Trainer

from .batches import batches_of

ROWS, D_IN, D_SAE = 70, 6, 20

KINDS: list[SAEConfig] = [
    StandardSAE(hidden_dim=D_SAE, seed=4, sparsity_coeff=1e-2),
    TopKSAE(hidden_dim=D_SAE, seed=4, k=2),
    BatchTopKSAE(hidden_dim=D_SAE, seed=4, k=2),
    MatryoshkaSAE(hidden_dim=D_SAE, seed=4, k=2),
    JumpReLUSAE(hidden_dim=D_SAE, seed=4, target_l0=3),
    GatedSAE(hidden_dim=D_SAE, seed=4),
    StandardSAE(hidden_dim=D_SAE, seed=4, penalty="decoder_norm"),
]


def rows() -> Tensor:
    return torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(0)) + 1


def recipe(**changes: Any) -> Recipe:
    numbers: dict[str, Any] = {
        "learning_rate": 1e-2,
        "batch_size": 16,
        "max_epochs": 14,
        "dead_after_rows": 100,
        "warmup": 0.1,
        "decay": 0.5,
        "grad_clip": 1.0,
        "reinitialize_dead_every": 2,
        "patience": 10,
    }
    return Recipe(**(numbers | changes))


def trainer_of(config: SAEConfig, seed: int = 0, **changes: Any) -> Trainer:
    return Trainer(build_sae(config, D_IN), recipe(**changes), rows=ROWS, device="cpu", seed=seed)


def epoch_of(trainer: Trainer, x: Tensor) -> EpochFigures:
    for batch in batches_of(trainer):
        trainer.step(x[batch])
    return trainer.end_epoch()


def bury(trainer: Trainer, count: int) -> None:
    """Give the first latents a bias so low that they are never active."""
    with torch.no_grad():
        trainer.sae.b_enc[:count] = -100.0


def flat(state: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a nested state by its path."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{path}/{key}").items()}
    if isinstance(state, list):
        return {k: v for i, value in enumerate(state) for k, v in flat(value, f"{path}/{i}").items()}
    return {path: state}


def assert_same(first: Any, second: Any) -> None:
    ours, theirs = flat(first), flat(second)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        same = torch.equal(value, theirs[path]) if isinstance(value, Tensor) else value == theirs[path]
        assert same, path


def test_what_a_gpu_had_not_seen_yet_is_seen_on_a_cpu() -> None:
    """A GPU's checkpoint says whether it has seen dead latents, which is some steps ago."""
    x, dead = rows(), 4
    config = TopKSAE(hidden_dim=D_SAE, seed=4, k=4, aux_k_coeff=1.0)
    trainer = trainer_of(config)
    trainer.prepare(x)
    bury(trainer, dead)
    trainer.load_state_dict(trainer.state_dict() | {"any_dead": False})
    trainer._rows_since_active_F[:dead] = trainer.recipe.dead_after_rows
    trainer.epoch = 100
    trainer.step(x[:16])
    figures = trainer.measure()
    assert figures is not None
    assert figures.sparsity_loss > 0


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
@pytest.mark.parametrize("stop_at", [1, 5, 8, 23])
def test_resumed_equals_uninterrupted_bit_for_bit(config: SAEConfig, stop_at: int) -> None:
    x = rows()

    def run(trainer: Trainer, until: int) -> list[EpochFigures]:
        figures: list[EpochFigures] = []
        while trainer.steps < until:
            for batch in batches_of(trainer):
                if trainer.steps == until:
                    return figures
                trainer.step(x[batch])
            figures.append(trainer.end_epoch())
        return figures

    uninterrupted = trainer_of(config)
    uninterrupted.prepare(x)
    bury(uninterrupted, 4)
    expected = run(uninterrupted, until=50)
    assert any(figures.reinitialized for figures in expected)

    first = trainer_of(config)
    first.prepare(x)
    bury(first, 4)
    seen = run(first, until=stop_at)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = trainer_of(config)
    second.load_state_dict(torch.load(file, weights_only=True))
    seen += run(second, until=50)
    assert seen == expected
    assert_same(second.state_dict(), uninterrupted.state_dict())


def test_a_checkpoint_of_another_run_is_refused() -> None:
    state = trainer_of(KINDS[0]).state_dict()
    with pytest.raises(ValueError, match="seed 0, not 70 and 1"):
        trainer_of(KINDS[0], seed=1).load_state_dict(state)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_the_same_seed_gives_the_same_weights(config: SAEConfig) -> None:
    def weights(seed: int) -> dict[str, Any]:
        trainer = trainer_of(config, seed=seed)
        trainer.prepare(rows())
        for _ in range(3):
            epoch_of(trainer, rows())
        return trainer.sae.state_dict()

    assert_same(weights(1), weights(1))
    with pytest.raises(AssertionError):
        assert_same(weights(1), weights(2))


def test_an_epoch_that_is_not_whole_cannot_be_closed() -> None:
    trainer = trainer_of(KINDS[0])
    trainer.step(rows()[:16])
    with pytest.raises(ValueError, match="70 rows, 16 were"):
        trainer.end_epoch()


def test_figures_of_an_epoch_are_means_over_rows() -> None:
    """With a learning rate too small to change a weight, an epoch's figures are those of all rows at once."""
    x, trainer = rows(), trainer_of(KINDS[0], learning_rate=1e-30, reinitialize_dead_every=0)
    bury(trainer, 5)
    figures = epoch_of(trainer, x)
    sae = trainer.sae
    acts = sae.encode(x).detach()
    active = acts > 1e-6
    error = (sae.decode(acts).detach() - x).square().mean().item()
    assert figures.reconstruction_loss == pytest.approx(error, rel=1e-5)
    assert figures.sparsity_loss == pytest.approx(1e-2 * acts.mean().item(), rel=1e-5)
    assert figures.loss == pytest.approx(figures.reconstruction_loss + figures.sparsity_loss, rel=1e-6)
    assert figures.l0 == pytest.approx(active.sum().item() / ROWS)
    assert figures.fraction_active == pytest.approx(active.double().mean().item())
    assert figures.dead_share == (~active.any(0)).double().mean().item() == 5 / D_SAE
    assert figures.rarely_active_share == 5 / D_SAE
    assert (figures.epochs, figures.stop_reason, figures.reinitialized) == (1, None, 0)
    with torch.no_grad():
        sae.b_enc[5:7] = -100.0
    assert epoch_of(trainer, x).dead_share == 7 / D_SAE  # counted anew in each epoch


def test_measuring_covers_the_steps_since_the_last_time() -> None:
    x, trainer = rows(), trainer_of(KINDS[0], learning_rate=1e-30)
    assert trainer.measure() is None
    trainer.step(x[:16])
    trainer.step(x[16:32])
    both = trainer.measure()
    assert both is not None
    trainer.step(x[32:48])
    one = trainer.measure()
    assert one is not None

    def loss(part: Tensor) -> float:
        acts = trainer.sae.encode(part).detach()
        return (trainer.sae.decode(acts).detach() - part).square().mean().item()

    assert both.reconstruction_loss == pytest.approx(loss(x[:32]), rel=1e-5)
    assert one.reconstruction_loss == pytest.approx(loss(x[32:48]), rel=1e-5)
    assert (both.step, one.step, one.epoch) == (2, 3, 0)


def test_measuring_changes_nothing() -> None:
    first, second = trainer_of(KINDS[1]), trainer_of(KINDS[1])
    for batch in batches_of(first):
        first.step(rows()[batch])
        second.step(rows()[batch])
        second.measure()
    assert first.end_epoch() == second.end_epoch()
    assert_same(first.sae.state_dict(), second.sae.state_dict())


def test_a_latent_counts_as_dead_after_so_many_rows() -> None:
    trainer = trainer_of(KINDS[0], dead_after_rows=20)
    bury(trainer, 5)
    shares = []
    for start in (0, 16, 32):
        trainer.step(rows()[start : start + 16])
        figures = trainer.measure()
        assert figures is not None
        shares.append(figures.dead_share)
    assert shares == [0, 5 / D_SAE, 5 / D_SAE]


def test_rarely_active_latents_start_again_with_fresh_moments() -> None:
    x, trainer = rows(), trainer_of(KINDS[0], reinitialize_dead_every=1)
    bury(trainer, 5)
    for batch in batches_of(trainer):
        trainer.step(x[batch])
    before = copy.deepcopy(trainer.state_dict())
    figures = trainer.end_epoch()
    assert figures.reinitialized == 5
    assert_same(trainer.state_dict()["sae"], before["sae"])  # stopped now, it is as it was trained
    trainer._reinitialize()  # as the next step does first
    after = trainer.state_dict()
    weight = after["sae"]["W_enc"]
    bound = (6 / (D_IN + D_SAE)) ** 0.5
    assert weight[:5].abs().max() <= bound
    assert bool((weight[:5] != before["sae"]["W_enc"][:5]).all())
    assert torch.equal(after["sae"]["W_dec"][:5], weight[:5])
    assert after["sae"]["b_enc"][:5].tolist() == [torch.tensor(-0.1).item()] * 5
    for name in ("W_enc", "b_enc", "W_dec"):
        assert torch.equal(after["sae"][name][5:], before["sae"][name][5:])
    assert torch.equal(after["sae"]["b_dec"], before["sae"]["b_dec"])
    for index in (0, 1, 2):
        for moment in ("exp_avg", "exp_avg_sq"):
            new = after["optimizer"]["state"][index][moment]
            old = before["optimizer"]["state"][index][moment]
            assert not new[:5].any()
            assert torch.equal(new[5:], old[5:])
            assert old[5:].any()


def test_nothing_is_reinitialized_in_the_last_ten_epochs_nor_when_training_ends() -> None:
    last = trainer_of(KINDS[0], max_epochs=10, reinitialize_dead_every=1)
    ended = trainer_of(KINDS[0], max_epochs=99, reinitialize_dead_every=1, min_loss=1e9)
    for trainer in (last, ended):
        bury(trainer, 5)
        figures = epoch_of(trainer, rows())
        assert figures.rarely_active_share == 5 / D_SAE
        assert figures.reinitialized == 0
    assert figures.stop_reason == "min_loss"


def test_topk_ends_only_when_all_steps_are_done() -> None:
    trainer, x = trainer_of(KINDS[1], max_epochs=13, patience=None, learning_rate=1e-30), rows()
    trainer.prepare(x)
    assert [epoch_of(trainer, x).stop_reason for _ in range(13)] == [None] * 12 + ["max_epochs"]
    assert trainer.steps == trainer.total_steps == 13 * 5


def test_a_loss_without_improvement_ends_training() -> None:
    trainer, x = (
        trainer_of(KINDS[0], max_epochs=99, learning_rate=1e-30, reinitialize_dead_every=0),
        torch.zeros(ROWS, D_IN),
    )
    assert [epoch_of(trainer, x).stop_reason for _ in range(11)] == [None] * 10 + ["no_improvement"]


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_a_loss_that_is_no_number_is_noticed(config: SAEConfig) -> None:
    x = rows()
    x[3, 2] = float("inf")
    trainer = trainer_of(config)
    for batch in batches_of(trainer):
        trainer.step(x[batch])
    with pytest.raises(TrainingDiverged, match="the loss is"):
        trainer.measure()
    with pytest.raises(TrainingDiverged, match="the loss is"):
        trainer.end_epoch()


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_an_encoder_weight_that_is_no_number_shows_in_the_loss(config: SAEConfig) -> None:
    x, trainer = rows(), trainer_of(config)
    trainer.prepare(x)
    with torch.no_grad():
        trainer.sae.W_enc[3, 2] = torch.nan
    trainer.step(x[:16])
    with pytest.raises(TrainingDiverged, match="the loss is nan"):
        trainer.measure()


def test_a_weight_that_is_no_number_is_noticed_when_the_loss_still_is_one() -> None:
    trainer = trainer_of(KINDS[0])
    for batch in batches_of(trainer):
        trainer.step(rows()[batch])
    with torch.no_grad():
        trainer.sae.b_dec[0] = float("nan")
    with pytest.raises(TrainingDiverged, match="a weight is no number"):
        trainer.end_epoch()


def test_half_precision_rows_are_trained_on_in_full_precision() -> None:
    trainer = trainer_of(KINDS[0])
    trainer.step(rows()[:16].half())
    assert {parameter.dtype for parameter in trainer.sae.parameters()} == {torch.float32}
    figures = trainer.measure()
    assert figures is not None
    assert figures.loss > 0


def test_epochs_without_improvement_are_counted_across_a_resume() -> None:
    x = torch.zeros(ROWS, D_IN)
    changes: dict[str, Any] = {"max_epochs": 99, "learning_rate": 1e-30, "reinitialize_dead_every": 0}
    first = trainer_of(KINDS[0], **changes)
    for _ in range(6):
        assert epoch_of(first, x).stop_reason is None
    second = trainer_of(KINDS[0], **changes)
    second.load_state_dict(first.state_dict())
    assert [epoch_of(second, x).stop_reason for _ in range(5)] == [None] * 4 + ["no_improvement"]


def test_a_trainer_that_is_done_with_is_freed_at_once() -> None:
    """With its weights and moments: of several SAEs the next one would else be trained beside them."""

    def used() -> "weakref.ref[Trainer]":
        trainer = trainer_of(TopKSAE(hidden_dim=24, seed=0, k=3))
        trainer.step(rows()[:8])
        return weakref.ref(trainer)

    used()  # PyTorch's first optimiser keeps what it was made in
    gc.disable()
    try:
        assert used()() is None
    finally:
        gc.enable()
