"""The largest entries of a matrix: exactly those, whatever the guess from the matrix before."""

import pytest
import torch
from torch import Tensor

from mistudio_train.sae.largest import LargestOfBatch, largest_of_rows


def matrix(rows: int = 40, columns: int = 300, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def chosen(largest: LargestOfBatch, x: Tensor, count: int) -> Tensor:
    active, smallest = largest.choose(x, count)
    found = active.dense(torch.ones(len(active.latents_N))).bool()
    assert smallest == (x[found].min() if found.any() else 0)
    return found


@pytest.mark.parametrize("count", [1, 7, 320, 4000])
@pytest.mark.parametrize("before", [None, 0.001, 1.0, 1000.0], ids=lambda scale: f"after {scale} times as much")
def test_finds_the_largest_after_any_other_matrix(count: int, before: float | None) -> None:
    x, largest = matrix(), LargestOfBatch()
    if before is not None:
        chosen(largest, matrix(seed=1) * before, count)
    expected = torch.zeros(x.numel(), dtype=torch.bool)
    expected[x.flatten().topk(count).indices] = True
    assert torch.equal(chosen(largest, x, count), expected.view_as(x))


@pytest.mark.parametrize("before", [0.01, 1.0, 100.0])
def test_of_equal_ones_at_the_border_the_first_stay(before: float) -> None:
    largest = LargestOfBatch()
    chosen(largest, matrix() * before, 5)
    x = torch.tensor([[1.0, 2.0, 1.0], [3.0, 1.0, 1.0]])
    assert chosen(largest, x, 4).tolist() == [[True, True, True], [True, False, False]]


def test_only_positive_ones_are_chosen() -> None:
    largest = LargestOfBatch()
    assert chosen(largest, torch.tensor([[1.0, -2.0], [0.0, 0.5]]), 3).tolist() == [[True, False], [False, True]]
    assert not chosen(largest, -matrix().abs(), 10).any()
    assert chosen(largest, matrix(), 10).sum() == 10  # and it finds its way back


def test_a_value_that_is_no_number_stays_to_be_seen() -> None:
    x = matrix()
    x[3, 4] = torch.nan
    active, _ = LargestOfBatch().choose(x, 10)
    assert active.pick(x).isnan().any()


@pytest.mark.parametrize(("columns", "k"), [(512, 2), (4096, 32), (4096, 1), (300, 4), (7, 7), (2048, 200)])
def test_finds_the_largest_of_each_row(columns: int, k: int) -> None:
    x = matrix(20, columns)
    found = largest_of_rows(x, k).sort(1).values
    assert torch.equal(found, x.topk(k, dim=1).indices.sort(1).values)


def test_finds_k_different_ones_among_equal_ones() -> None:
    x = torch.randint(0, 3, (20, 1024), generator=torch.Generator().manual_seed(0)).float()
    found = largest_of_rows(x, 8)
    assert all(len(set(row)) == 8 for row in found.tolist())
    assert torch.equal(x.gather(1, found).sort(1).values, x.topk(8, dim=1).values.sort(1).values)


def test_a_row_with_a_value_that_is_no_number_has_it_among_its_largest() -> None:
    x = matrix(4, 1024)
    x[2, 77] = torch.nan
    assert 77 in largest_of_rows(x, 4)[2].tolist()


@pytest.mark.parametrize("columns", [64, 4096], ids=["in one stage", "in two"])
def test_equal_ones_at_the_border_of_a_row_do_not_make_it_longer(columns: int) -> None:
    x = matrix(6, columns).abs()
    x[2, :7] = 9.0  # more than are wanted
    x[4, 3] = torch.nan  # and one that is no number, elsewhere
    found = largest_of_rows(x, 5)
    assert found.shape == (6, 5)
    assert all(len(set(row)) == 5 for row in found.tolist())
    assert set(found[2].tolist()) <= set(range(7))
    assert 3 in found[4].tolist()
    for row in (0, 1, 3, 5):
        assert sorted(found[row].tolist()) == sorted(x[row].topk(5).indices.tolist())
