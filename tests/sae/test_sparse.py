"""Arithmetic on active entries only, against the same on dense matrices, with Intel MKL and without it."""

import pytest
import torch
from torch import Tensor

from mistudio_train.sae.sparse import Active, Everywhere, active_above, centred_bias, decode_at, encode_at, with_bias

ROWS, D_IN, D_SAE = 6, 4, 9
PATTERNS: dict[str, list[list[int]]] = {
    "the same number a row": [[3, 1], [8, 0], [1, 2], [5, 4], [1, 3], [0, 1]],
    "several numbers a row": [[0, 4, 8], [], [4], [1, 2, 3, 4, 5], [], [8]],
    "none at all": [[]] * ROWS,
    "all of them": [list(range(D_SAE))] * ROWS,
}


@pytest.fixture(params=["MKL", "dense"], autouse=True)
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "dense":
        monkeypatch.setattr(Active, "_by_library", staticmethod(lambda _: False))
    elif not Active._by_library(torch.zeros(1)):
        pytest.fail("this PyTorch has no MKL, so that its own way stays untested here")


@pytest.fixture(params=list(PATTERNS.values()), ids=list(PATTERNS))
def active(request: pytest.FixtureRequest) -> Active:
    return pattern(request.param)


def pattern(latents: list[list[int]]) -> Active:
    starts = torch.tensor([len(row) for row in latents]).cumsum(0)
    flat = torch.tensor([latent for row in latents for latent in row], dtype=torch.int64)
    return Active(torch.cat([torch.zeros(1), starts]).int(), flat, D_SAE)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_products_are_those_of_the_dense_matrix(active: Active) -> None:
    values, weight, rows = drawn(len(active.latents_N)), drawn(D_SAE, D_IN, seed=1), drawn(ROWS, D_IN, seed=2)
    dense = active.dense(values)
    assert torch.equal(active.pick(dense), values)
    torch.testing.assert_close(active.times(values, weight), dense @ weight)
    torch.testing.assert_close(active.transpose_times(values, rows), dense.T @ rows)
    torch.testing.assert_close(active.products(rows, weight), active.pick(rows @ weight.T))
    torch.testing.assert_close(active.sum_by_latent(values), dense.sum(0))
    assert torch.equal(active.count_above(values, 0.5), (dense > 0.5).sum(0))
    torch.testing.assert_close(active.max_by_latent(values.abs()), dense.abs().amax(0))
    rows_N, latents_N, values_N = active.entries(values)
    assert torch.equal(values_N, dense[rows_N, latents_N])
    assert len(values_N) == int((dense != 0).sum())


def test_some_rows_are_a_matrix_of_their_own(active: Active) -> None:
    values, which = drawn(len(active.latents_N)), torch.tensor([True, False, True, True, False, True])
    dense = active.dense(values)
    some, theirs = active.of_rows(which)
    assert torch.equal(some.dense(values[theirs]), dense[which])
    everywhere, all_theirs = Everywhere(ROWS, D_SAE).of_rows(which)
    assert everywhere.rows == some.rows == 4
    assert torch.equal(everywhere.dense(dense[all_theirs]), dense[which])
    nothing, none_theirs = active.of_rows(torch.zeros(ROWS, dtype=torch.bool))
    assert (nothing.rows, len(values[none_theirs])) == (0, 0)


def test_gradients_are_right(active: Active) -> None:
    rows, centre, bias = drawn(ROWS, D_IN), drawn(D_IN, seed=1), drawn(D_SAE, seed=2)
    w_enc, w_dec = drawn(D_SAE, D_IN, seed=3), drawn(D_SAE, D_IN, seed=4)
    inputs = [tensor.requires_grad_() for tensor in (centre, w_enc, bias, w_dec)]

    def there_and_back(centre: Tensor, w_enc: Tensor, bias: Tensor, w_dec: Tensor) -> Tensor:
        centred = (rows - centre).detach()
        pre = (centred @ w_enc.T + bias).detach()
        values = active.pick(pre)
        values = encode_at(active, values, centred, w_enc)
        values = with_bias(active, values, centred_bias(centre, w_enc, bias))
        return decode_at(active, values.tanh(), w_dec)

    assert torch.autograd.gradcheck(there_and_back, inputs)


def test_places_known_to_be_zero_are_left_out_of_products_and_keep_their_gradient(active: Active) -> None:
    scores, floor = drawn(len(active.latents_N), seed=9), drawn(D_SAE, seed=8)
    banded = active.zero_below(scores, floor)
    values = drawn(len(active.latents_N)) * (scores > active.per_place(floor))
    weight, rows = drawn(D_SAE, D_IN, seed=1), drawn(ROWS, D_IN, seed=2)
    torch.testing.assert_close(banded.times(values, weight), active.times(values, weight))
    torch.testing.assert_close(banded.transpose_times(values, rows), active.transpose_times(values, rows))
    torch.testing.assert_close(banded.products(rows, weight), active.products(rows, weight))
    assert torch.equal(banded.pick(active.dense(values)), values)


def test_all_places_have_the_dense_matrix_as_their_values() -> None:
    everywhere, all_of_them = Everywhere(ROWS, D_SAE), pattern(PATTERNS["all of them"])
    values, weight, rows = drawn(ROWS, D_SAE), drawn(D_SAE, D_IN, seed=1), drawn(ROWS, D_IN, seed=2)
    flat, per_latent = values.flatten(), drawn(D_SAE, seed=3)
    torch.testing.assert_close(everywhere.times(values, weight), all_of_them.times(flat, weight))
    torch.testing.assert_close(everywhere.transpose_times(values, rows), all_of_them.transpose_times(flat, rows))
    torch.testing.assert_close(everywhere.products(rows, weight).flatten(), all_of_them.products(rows, weight))
    torch.testing.assert_close(everywhere.sum_by_latent(values), all_of_them.sum_by_latent(flat))
    torch.testing.assert_close(everywhere.per_place(per_latent).flatten(), all_of_them.per_place(per_latent))
    assert torch.equal(everywhere.count_above(values, 0.5), all_of_them.count_above(flat, 0.5))
    assert torch.equal(everywhere.max_by_latent(values.abs()), all_of_them.max_by_latent(flat.abs()))
    for mine, others in zip(everywhere.entries(values), all_of_them.entries(flat), strict=True):
        assert torch.equal(mine, others)
    assert torch.equal(everywhere.pick(values), everywhere.dense(values))


def test_many_active_places_are_all_places() -> None:
    few = torch.zeros(4, 16)
    few[0, 3] = few[2, 5] = 1
    few[2, 6] = torch.nan
    assert active_above(few, 0.5).latents_N.tolist() == [3, 5, 6]
    assert active_above(few, torch.arange(16) / 4).latents_N.tolist() == [3, 6]
    assert isinstance(active_above(few, -1), Everywhere)
    assert active_above(few, -1).rows == 4


def test_places_in_the_flattened_matrix_are_understood(active: Active) -> None:
    dense = active.dense(torch.ones(len(active.latents_N)))
    found = Active.at(dense.flatten().nonzero().squeeze(1), ROWS, D_SAE)
    assert torch.equal(found.dense(torch.ones(len(found.latents_N))), dense)


def test_many_latents_are_told_apart() -> None:
    wide = Active.same_number(torch.tensor([[70_000, 4_464], [32_767, 32_768]]), 70_001)
    found = wide.transpose_times(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.eye(2))
    assert found[[70_000, 4_464, 32_767, 32_768]].tolist() == [[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 4.0]]


def test_the_same_number_of_latents_a_row() -> None:
    indices = torch.tensor([[2, 0], [1, 2]])
    active = Active.same_number(indices, 3)
    assert active.dense(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [[2.0, 0.0, 1.0], [0.0, 3.0, 4.0]]
