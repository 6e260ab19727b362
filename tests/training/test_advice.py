"""Sentences of advice: each where it is true, and none where the data are good."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mistudio_schemas import SAEMetrics
from mistudio_train.training.advice import on_result, on_rows, on_sparsity

WIDTH = 16


class Rows:
    def __init__(self, rows_ND: Tensor) -> None:
        self.rows_ND = rows_ND

    @property
    def rows(self) -> int:
        return len(self.rows_ND)

    def gather(self, indices: NDArray[np.int64]) -> Tensor:
        return self.rows_ND[torch.from_numpy(indices)]


def random_rows(count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0)) + 5


def test_of_many_different_texts_there_is_nothing_to_say() -> None:
    assert list(on_rows(Rows(random_rows(3000)), lambda text: 10 + text % 7)) == []


def test_few_texts() -> None:
    (said,) = on_rows(Rows(random_rows(200)), lambda text: 10 + text % 7)
    assert "of 200 texts" in said
    assert "clusters rather than features" in said


def test_near_duplicates() -> None:
    rows = random_rows(2000)
    rows[:300] = rows[300:600] + 1e-4
    (said,) = on_rows(Rows(rows), lambda text: 10 + text % 7)
    assert said.startswith("30% of the texts have a near-duplicate")


def test_length_that_explains_most() -> None:
    lengths = [1 + 7919 * text % 2000 for text in range(2000)]
    rows = random_rows(2000)
    rows[:, 0] += 5 * torch.tensor(lengths).double().log().float()
    (said,) = on_rows(Rows(rows), lambda text: lengths[text])
    assert "is their length" in said


def test_rows_that_are_all_the_same_are_twins_and_no_error() -> None:
    (said,) = on_rows(Rows(torch.full((1500, WIDTH), 3.0)), lambda text: 5)
    assert said.startswith("100% of the texts have a near-duplicate")


def metrics(fvu: float | None, training_fvu: float | None, held_out: bool = True) -> SAEMetrics:
    undefined = dict.fromkeys(SAEMetrics.model_fields)
    return SAEMetrics.model_validate(undefined | {"fvu": fvu, "training_fvu": training_fvu, "held_out": held_out})


MANY = np.full(100, 50)


def test_of_a_good_sae_there_is_nothing_to_say() -> None:
    assert list(on_result("a", 5000, 100, metrics(0.3, 0.25), MANY)) == []
    assert list(on_result("a", 5000, 100, metrics(None, None), MANY)) == []


@pytest.mark.parametrize(
    ("rows", "figures", "active", "part"),
    [
        (500, metrics(0.3, 0.25), MANY, "500 rows are few for 100 latents"),
        (5000, metrics(0.4, 0.25), MANY, "knows these by heart"),
        (5000, metrics(0.3, 0.25), np.array([0] * 50 + [3] * 20 + [50] * 30), "20 of 50 latents are active on fewer"),
    ],
)
def test_what_is_odd_is_said(rows: int, figures: SAEMetrics, active: NDArray[np.int64], part: str) -> None:
    (said,) = on_result("a", rows, 100, figures, active)
    assert said.startswith("a: ")
    assert part in said


@pytest.mark.parametrize(("share", "said"), [(None, False), (0.01, False), (0.1, False), (0.48, True)])
def test_an_sae_that_is_hardly_sparse_is_said_to_be(share: float | None, said: bool) -> None:
    metrics = SAEMetrics(**dict.fromkeys(SAEMetrics.model_fields)).model_copy(update={"fraction_active": share})
    found = list(on_sparsity("s", "standard", metrics))
    assert bool(found) == said
    if said:
        assert "48% of the latents" in found[0]
        assert "sparsity_coeff" in found[0]
