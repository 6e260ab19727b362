"""Planned memory and twelve SAEs at once: the arithmetic, and that what is asked for can be asked for."""

import pytest
from benchmarks.step_memory import BASE, SHAPES, Taken, fitted

from benchmarks import planned, step_memory, sweep
from mistudio_schemas import TrainRequested
from mistudio_train.training.memory_plan import STEP_BYTES, Copies


def test_an_error_is_a_share_of_what_was_held() -> None:
    assert planned.Compared("job", planned=110, held=100).error == pytest.approx(0.1)
    assert planned.Compared("job", planned=50, held=100).error == pytest.approx(-0.5)


def test_the_fit_finds_the_copies_that_a_training_was_made_of() -> None:
    copies = Copies(parameters=6.5, places=2.5, rows=9)
    taken = [Taken("topk", *shape, (copies.bytes(*shape) + STEP_BYTES) / 1e6) for shape in SHAPES]
    assert BASE > 0
    assert fitted(taken) == pytest.approx((6.5, 2.5, 9), rel=1e-3)


def test_one_real_training_takes_more_than_its_weights_and_moments() -> None:
    taken = step_memory.take("batchtopk", 64, 2048, 256)
    assert 4 * taken.matrices[0] < taken.megabytes < 4 * taken.planned


def test_every_job_of_the_benchmarks_is_a_valid_request() -> None:
    for fields in planned.JOBS.values():
        TrainRequested(model_name="m", corpus_file="c.txt", max_epochs=1, **fields)
    request = TrainRequested(model_name="m", corpus_file="c.txt", pooling="token", max_epochs=1, saes=sweep.saes())
    assert len({(sae.kind, sae.hidden_dim, sae.layer_number) for sae in request.resolved_saes()}) == 12
    assert {sae.layer_number for sae in request.resolved_saes()} == {6, 9}
