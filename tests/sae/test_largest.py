"""The largest entries of a matrix: exactly those, whatever the guess from the matrix before."""

import pytest
import torch
from torch import Tensor

from mistudio_train.sae.largest import LargestOfBatch


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
