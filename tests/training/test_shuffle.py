"""The order of training rows: every one once an epoch, from any place on, whatever the buffer; and its memory."""

import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from mistudio_schemas import RowsInfo
from mistudio_train.training import shuffle
from mistudio_train.training.activations import ActivationWriter, Layout
from mistudio_train.training.disk import ArrayFile, ArrayWriter
from mistudio_train.training.selection import HELD_OUT, HIGH_NORM, Selection
from mistudio_train.training.shuffle import BLOCK_BYTES, ShuffledRows

from .test_activations import stored

ROWS, WIDTH = 5000, 512
BLOCK = BLOCK_BYTES // (4 * WIDTH)


def selection_of(folder: Path, flags: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> Selection:
    with ArrayWriter(folder / "flags.bin", np.uint8) as writer:
        writer.append(flags)
    training = int((flags & (HELD_OUT | HIGH_NORM) == 0).sum())
    info = RowsInfo(total=len(flags), training=training, held_out=0, left_out=0, first_token=0, high_norm=0)
    return Selection(ArrayFile(folder / "flags.bin", np.uint8), HIGH_NORM, info)


def shuffled(folder: Path, buffer_bytes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> ShuffledRows:
    """Row i is i everywhere; two of seven rows are not trained on."""
    rows_ND = torch.arange(ROWS, dtype=torch.float32)[:, None].expand(ROWS, WIDTH).to(dtype)
    flags = np.zeros(ROWS, np.uint8)
    flags[::7], flags[3::7] = HELD_OUT, HIGH_NORM
    store = stored(folder, rows_ND, shard_rows=777)
    return ShuffledRows(store, selection=selection_of(folder, flags), seed=seed, buffer_bytes=buffer_bytes)


def copied(batches: Iterable[Tensor]) -> list[Tensor]:
    """As each is gone when the next one is asked for."""
    return [batch.clone() for batch in batches]


def numbers(batches: list[Tensor]) -> list[int]:
    return torch.cat(batches)[:, 0].int().tolist()


TRAINED_ON = [row for row in range(ROWS) if row % 7 not in (0, 3)]
SIZES = [BLOCK_BYTES, 10 * BLOCK_BYTES, 1 << 30]


@pytest.mark.parametrize("buffer_bytes", SIZES)
def test_an_epoch_holds_every_training_row_once_and_no_other(tmp_path: Path, buffer_bytes: int) -> None:
    rows = shuffled(tmp_path, buffer_bytes)
    batches = copied(rows.batches(0, 64))
    assert {len(batch) for batch in batches[:-1]} == {64}
    assert sorted(numbers(batches)) == TRAINED_ON
    assert rows.rows == len(TRAINED_ON)
    assert all(torch.equal(batch[:, :1].expand_as(batch), batch) for batch in batches)


@pytest.mark.parametrize("buffer_bytes", SIZES)
@pytest.mark.parametrize("start", [1, 64, 65, 1000, 3520, len(TRAINED_ON) - 1, len(TRAINED_ON)])
def test_the_order_goes_on_from_any_place(tmp_path: Path, buffer_bytes: int, start: int) -> None:
    whole = numbers(copied(shuffled(tmp_path / "a", buffer_bytes).batches(3, 64)))
    rest = copied(shuffled(tmp_path / "b", buffer_bytes).batches(3, 64, start))
    assert (numbers(rest) if rest else []) == whole[start:]


@pytest.mark.parametrize("buffer_bytes", SIZES)
@pytest.mark.parametrize("start", [0, 1000])
def test_rows_of_two_stores_come_side_by_side_in_the_order_of_one(
    tmp_path: Path, buffer_bytes: int, start: int
) -> None:
    numbers_ND = torch.arange(ROWS, dtype=torch.float32)[:, None].expand(ROWS, WIDTH)
    flags = np.zeros(ROWS, np.uint8)
    flags[::7], flags[3::7] = HELD_OUT, HIGH_NORM
    stores = [stored(tmp_path / name, sign * numbers_ND, shard_rows=777) for name, sign in (("x", 1), ("y", -1))]
    selection = selection_of(tmp_path, flags)
    pairs = ShuffledRows(*stores, selection=selection, seed=0, buffer_bytes=2 * buffer_bytes)
    alone = ShuffledRows(stores[0], selection=selection, seed=0, buffer_bytes=buffer_bytes)
    both = copied(pairs.batches(1, 64, start))
    assert numbers(both) == numbers(copied(alone.batches(1, 64, start)))
    assert {tuple(batch.shape[1:]) for batch in both} == {(2 * WIDTH,)}
    assert all(torch.equal(batch[:, :WIDTH], -batch[:, WIDTH:]) for batch in both)
    assert pairs.d_in == WIDTH
    assert pairs.sample(100).shape == (min(100, len(pairs.sample(100))), 2 * WIDTH)


@pytest.mark.parametrize("buffer_bytes", SIZES)
def test_the_order_depends_on_seed_and_epoch_alone(tmp_path: Path, buffer_bytes: int) -> None:
    def order(seed: int, *epochs: int) -> list[int]:
        rows = shuffled(tmp_path, buffer_bytes, seed)
        return [numbers(copied(rows.batches(epoch, 64))) for epoch in epochs][-1]

    assert order(0, 2) == order(0, 0, 1, 2)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


def test_a_batch_has_rows_from_everywhere_although_the_buffer_is_small(tmp_path: Path) -> None:
    """Of the rows of one buffer, which are as many as ten blocks, next to none are neighbours."""
    order = np.array(numbers(copied(shuffled(tmp_path, 20 * BLOCK_BYTES).batches(0, 64))))
    assert (np.abs(np.diff(order)) <= 2).mean() < 0.05
    spread = [np.ptp(order[start : start + 64]) for start in range(0, len(order) - 64, 64)]
    assert np.median(spread) > 0.8 * ROWS


T = TypeVar("T")


def at_once(items: Generator[T], count: int) -> Generator[T]:
    """`ahead`, but always as far ahead as that may ever be."""
    coming = deque(islice(items, count))
    while coming:
        item = coming.popleft()
        coming.extend(islice(items, 1))
        yield item


@pytest.mark.parametrize("buffer_bytes", SIZES)
def test_a_batch_stays_until_the_next_one_is_asked_for(
    tmp_path: Path, buffer_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = copied(shuffled(tmp_path / "a", buffer_bytes).batches(0, 64))
    monkeypatch.setattr(shuffle, "ahead", at_once)
    for batch, wanted in zip(shuffled(tmp_path / "b", buffer_bytes).batches(0, 64), expected, strict=True):
        assert torch.equal(batch, wanted)


def test_rows_keep_their_precision(tmp_path: Path) -> None:
    batch = next(shuffled(tmp_path, 1 << 30, dtype=torch.bfloat16).batches(0, 64))
    assert (batch.dtype, batch.shape) == (torch.bfloat16, (64, WIDTH))


def test_a_sample_is_of_the_first_epochs_first_rows(tmp_path: Path) -> None:
    rows = shuffled(tmp_path, 1 << 30)
    first = numbers(copied(rows.batches(0, 100))[:1])
    assert numbers([rows.sample(100)]) == sorted(first)
    assert len(rows.sample(10**9)) == len(TRAINED_ON)


def test_a_shard_that_is_cut_short_is_an_error_and_not_another_row(tmp_path: Path) -> None:
    rows = shuffled(tmp_path, 10 * BLOCK_BYTES)
    with (tmp_path / "shard-00003.bin").open("r+b") as shard:
        shard.truncate(1000)
    with pytest.raises(EOFError, match="shorter"):
        list(rows.batches(0, 64))


TRAIN_ALL = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from tests.training.test_shuffle import Layout, ShuffledRows, selection_of
from tests.training.test_activations import ActivationStore, index_of
torch.set_num_threads(1)
folder, rows, sites = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
store = ActivationStore(folder, Layout(256, torch.float32, (0, rows)), index_of(folder / "index", rows))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
selection = selection_of(folder, np.zeros(rows, np.uint8))
shuffled = ShuffledRows(*[store] * sites, selection=selection, seed=0, buffer_bytes=8 << 20)
shuffled.sample(1000)
before = peak()
total = sum(len(batch) for epoch in range(2) for batch in shuffled.batches(epoch, 512))
assert total == 2 * rows
print(peak() - before)
"""


@pytest.mark.parametrize("sites", [1, 2])
def test_memory_is_the_buffers_however_many_rows_there_are(tmp_path: Path, sites: int) -> None:
    """300 MB a site through two buffers of 8 MiB, one of which is there before, by a fresh process."""
    rows, chunk = 300_000, torch.randn(1000, 256)
    writer = ActivationWriter(tmp_path, Layout(256, torch.float32, (0, rows)))
    for start in range(0, rows, len(chunk)):
        writer.write(start, chunk)
    writer.close()
    command = [sys.executable, "-c", TRAIN_ALL, str(tmp_path), str(rows), str(sites)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 24 * 1024**2
