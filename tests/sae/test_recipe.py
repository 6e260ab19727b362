"""From a request to the numbers of a training run, the learning rate's course, and when training ends."""

import math

import pytest

from mistudio_schemas import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    PenaltyFields,
    SAEConfig,
    StandardSAE,
    TopKSAE,
    TrainRequested,
)
from mistudio_train.sae.build import build_sae, recipe_for, settled
from mistudio_train.sae.l1 import L1Autoencoder
from mistudio_train.sae.recipe import EarlyStopping, Recipe, StopReason
from mistudio_train.sae.scaled import ScaledAutoencoder
from mistudio_train.sae.topk import TopKAutoencoder


def resolved(sae: SAEConfig | None, max_epochs: int = 50) -> SAEConfig:
    request = TrainRequested(model_name="m", corpus_file="c.txt", sae=sae, max_epochs=max_epochs)
    return request.resolved_saes()[0]


def test_the_seeds_request_means_what_the_seed_says() -> None:
    recipe = recipe_for(resolved(None), rows=5000, mean_pooled=True)
    assert recipe == Recipe(
        learning_rate=1e-4,
        batch_size=16,
        max_epochs=50,
        dead_after_rows=5000,
        reinitialize_dead_every=10,
        min_loss=0.01,
        patience=10,
    )
    sae = build_sae(resolved(None), d_in=32)
    assert (sae.kind, sae.d_in, sae.d_sae) == ("standard", 32, 1024)


def test_topk_takes_its_kinds_own_recipe() -> None:
    config = resolved(TopKSAE(hidden_dim=4096, k=7))
    recipe = recipe_for(config, rows=100_000, mean_pooled=False)
    assert recipe.learning_rate == pytest.approx(4e-4)  # 2e-4 / sqrt(1 / 4)
    assert (recipe.warmup, recipe.decay, recipe.grad_clip) == (0.05, 0.2, 1.0)
    assert (recipe.batch_size, recipe.dead_after_rows, recipe.adam_eps) == (1024, 250_000, 1e-12)
    assert (recipe.min_loss, recipe.patience, recipe.reinitialize_dead_every) == (None, None, 0)
    sae = build_sae(config, d_in=31)
    assert isinstance(sae, TopKAutoencoder)
    assert (sae.k, sae.k_aux, sae.aux_k_coeff) == (7, 16, 1.0)


def test_a_learning_rate_that_was_asked_for_is_used() -> None:
    assert recipe_for(resolved(TopKSAE(learning_rate=0.5)), rows=10, mean_pooled=False).learning_rate == 0.5


@pytest.mark.parametrize(
    ("rows", "mean_pooled", "expected"),
    [(5000, True, 256), (2000, True, 125), (100, True, 16), (100, False, 1024), (10**6, True, 256)],
)
def test_a_mean_pooled_topk_takes_smaller_batches(rows: int, mean_pooled: bool, expected: int) -> None:
    assert recipe_for(resolved(TopKSAE()), rows=rows, mean_pooled=mean_pooled).batch_size == expected


def test_dead_after_is_a_share_of_the_run_and_at_most_ten_million_rows() -> None:
    recipe = recipe_for(resolved(TopKSAE(dead_after=0.5), max_epochs=100), rows=10**6, mean_pooled=False)
    assert recipe.dead_after_rows == 10_000_000


def test_a_mean_pooled_job_has_defaults_of_its_own() -> None:
    config = settled(resolved(BatchTopKSAE(), max_epochs=100), rows=5000, mean_pooled=True)
    assert isinstance(config, BatchTopKSAE)
    assert (config.k, config.batch_size, config.aux_k_coeff, config.resample_at) == (16, 256, 0.0, [0.2, 0.4])
    recipe = recipe_for(config, rows=5000, mean_pooled=True)
    assert (recipe.dead_after_rows, recipe.held_out_patience, recipe.resample_at) == (5 * 5000, 10, (0.2, 0.4))
    assert settled(config, rows=5000, mean_pooled=True) == config
    many = settled(resolved(BatchTopKSAE()), rows=20_000, mean_pooled=True)
    assert isinstance(many, BatchTopKSAE)
    assert many.aux_k_coeff == 1 / 32


@pytest.mark.parametrize("sae", [GatedSAE(), JumpReLUSAE(), StandardSAE(penalty="decoder_norm")])
def test_dead_latents_are_lifted_unless_rows_are_few_and_pooled(sae: SAEConfig) -> None:
    def coefficient(rows: int, mean_pooled: bool) -> float | None:
        config = settled(resolved(sae), rows=rows, mean_pooled=mean_pooled)
        assert isinstance(config, PenaltyFields)
        return config.pre_act_coeff

    assert (coefficient(5000, True), coefficient(20_000, True), coefficient(100, False)) == (0.0, 0.03, 0.03)
    built = build_sae(resolved(sae.model_copy(update={"pre_act_coeff": 0.5})), d_in=4)
    assert isinstance(built, ScaledAutoencoder)
    assert built.pre_act_coeff == 0.5


def test_what_was_asked_for_is_not_settled_otherwise() -> None:
    asked = BatchTopKSAE(
        k=3, batch_size=7, aux_k_coeff=0.5, resample_at=[], patience=0, dead_after=0.3, learning_rate=1e-3
    )
    config = resolved(asked)
    assert settled(config, rows=5000, mean_pooled=True) == config


def test_rows_to_train_on_may_be_named_instead_of_epochs() -> None:
    recipe = recipe_for(resolved(TopKSAE(batch_size=10, training_rows=250), max_epochs=99), rows=100, mean_pooled=False)
    assert (recipe.max_epochs, recipe.total_steps(rows=100), recipe.dead_after_rows) == (3, 25, 13)


def test_the_schedule_of_decoder_norms_is_not_the_seeds() -> None:
    config = resolved(StandardSAE(penalty="decoder_norm"))
    recipe = recipe_for(config, rows=1000, mean_pooled=False)
    assert (recipe.warmup, recipe.decay, recipe.grad_clip, recipe.batch_size) == (0.05, 0.2, 1.0, 1024)
    assert (recipe.min_loss, recipe.patience, recipe.reinitialize_dead_every) == (None, None, 0)
    assert isinstance(build_sae(config, d_in=4), L1Autoencoder)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"warmup": 0.1, "grad_clip": 2.0}, "warmup, grad_clip"),
        ({"sparsity_warmup": 0.2}, "sparsity_warmup"),
        ({"penalty": "decoder_norm", "min_loss": 0.1}, "min_loss"),
        ({"sparsity_coeff": 2.0}, "should be <= 1.0"),
    ],
)
def test_a_field_of_the_other_penalty_is_refused_by_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        StandardSAE.model_validate(fields)


def test_what_was_not_resolved_is_refused() -> None:
    with pytest.raises(ValueError, match="'hidden_dim' is missing"):
        build_sae(StandardSAE(), d_in=4)
    with pytest.raises(ValueError, match="'learning_rate' is missing"):
        recipe_for(StandardSAE(), rows=4, mean_pooled=True)
    with pytest.raises(ValueError, match="k must be at most the hidden dimension"):
        build_sae(TopKSAE(hidden_dim=8, k=9, seed=0), d_in=4)


def recipe(**changes: float | None) -> Recipe:
    numbers: dict[str, float | None] = {"learning_rate": 1.0, "batch_size": 10, "max_epochs": 5, "dead_after_rows": 1}
    return Recipe(**(numbers | changes))  # type: ignore[arg-type]


def test_the_last_batch_of_an_epoch_counts() -> None:
    assert recipe().total_steps(rows=21) == 15


def test_the_learning_rate_rises_stays_and_falls() -> None:
    course = [recipe(warmup=0.2, decay=0.4).learning_rate_at(step, 10) for step in range(10)]
    assert course == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert {recipe().learning_rate_at(step, 10) for step in range(10)} == {1.0}


def test_the_learning_rate_is_positive_even_when_rise_and_fall_overlap() -> None:
    course = [recipe(warmup=1, decay=1).learning_rate_at(step, 4) for step in range(4)]
    assert course == [0.25, 0.5, 0.5, 0.25]


def test_latents_are_reinitialized_every_so_many_epochs_but_not_in_the_last_ten() -> None:
    numbers = recipe(max_epochs=50, reinitialize_dead_every=10)
    assert [epoch for epoch in range(1, 51) if numbers.reinitializes_after(epoch)] == [10, 20, 30, 40]
    assert not any(recipe(max_epochs=19, reinitialize_dead_every=10).reinitializes_after(e) for e in range(1, 20))
    assert not any(recipe(max_epochs=50).reinitializes_after(epoch) for epoch in range(1, 51))


def reasons(stopping: EarlyStopping, losses: list[float]) -> list[StopReason | None]:
    return [stopping.after(epoch, loss) for epoch, loss in enumerate(losses, start=1)]


def test_ends_when_the_mean_loss_is_below_the_minimum() -> None:
    assert reasons(EarlyStopping(recipe(min_loss=0.5)), [0.6, 0.5, 0.4]) == [None, None, "min_loss"]


def test_ends_after_ten_epochs_in_a_row_without_improvement() -> None:
    losses = [1.0] * 10 + [0.9] + [0.9] * 10
    expected = [None] * 20 + ["no_improvement"]
    assert reasons(EarlyStopping(recipe(max_epochs=99, patience=10)), losses) == expected


def test_ends_when_held_out_rows_are_not_reconstructed_better_any_more() -> None:
    stopping = EarlyStopping(recipe(max_epochs=99, held_out_patience=2))
    fvus = [0.5, 0.4, 0.45, 0.39, 0.4, 0.41]
    said = [stopping.after(epoch, 1.0 / epoch, fvu) for epoch, fvu in enumerate(fvus, start=1)]
    assert said == [None] * 5 + ["no_improvement"]


def test_what_was_seen_goes_with_the_state() -> None:
    first, second = (EarlyStopping(recipe(max_epochs=99, patience=2, held_out_patience=9)) for _ in range(2))
    first.after(1, 0.5, 0.5)
    first.after(2, 0.6, 0.4)
    second.load_state_dict(first.state_dict())
    assert second.after(3, 0.6, 0.4) == first.after(3, 0.6, 0.4) == "no_improvement"


def test_ends_with_the_last_epoch() -> None:
    assert reasons(EarlyStopping(recipe(max_epochs=2)), [1.0, math.pi]) == [None, "max_epochs"]


def test_without_rules_only_the_last_epoch_ends_it() -> None:
    assert reasons(EarlyStopping(recipe(max_epochs=30)), [0.0] * 30) == [None] * 29 + ["max_epochs"]
