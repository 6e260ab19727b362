"""The order of rows: every row once, from anywhere, all orders alike, at a size that no list could have."""

import tracemalloc
from itertools import islice

import numpy as np
import pytest

from mistudio_train.training.order import RowOrder


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 255, 256, 257, 1000, 65_537, 200_000])
def test_every_row_comes_once(rows: int) -> None:
    order = RowOrder(rows, (1, 2)).at(0, rows)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(rows))


def test_a_part_is_the_same_whichever_way_it_is_reached() -> None:
    order = RowOrder(100_000, (0, 0))
    whole = order.at(0, 100_000)
    assert np.array_equal(order.at(70_000, 71_000), whole[70_000:71_000])
    assert np.array_equal(np.concatenate(list(order.batches(768, 1536))), whole[1536:])
    assert [len(batch) for batch in order.batches(30_000)] == [30_000, 30_000, 30_000, 10_000]


def test_each_part_of_the_key_gives_another_order() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (2**63 - 1, 0)]
    assert len({tuple(RowOrder(50, key).at(0, 50).tolist()) for key in keys}) == len(keys)


@pytest.mark.parametrize("rows", [40, 100])
def test_a_row_is_as_likely_in_every_place(rows: int) -> None:
    """Chi-square of rows by places over many keys, within five standard deviations of what chance gives."""
    keys, counts = 1000, np.zeros((rows, rows))
    for key in range(keys):
        counts[np.arange(rows), RowOrder(rows, (key, 0)).at(0, rows)] += 1
    chi_square = ((counts - keys / rows) ** 2 / (keys / rows)).sum()
    freedom = (rows - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbours_have_nothing_to_do_with_each_other() -> None:
    order = RowOrder(1_000_000, (5, 0)).at(0, 100_000).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / np.sqrt(len(order))


def test_a_trillion_rows_take_no_more_memory_than_a_few() -> None:
    order = RowOrder(10**12, (0, 0))
    tracemalloc.start()
    batches = list(islice(order.batches(2048, 10**11), 100))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(0 <= int(batch.min()) <= int(batch.max()) < 10**12 for batch in batches)
    assert peak < 32 * 1024**2
