"""Windows around places, and strengths in them, against the dense matrix."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mistudio_train.training.disk import ArrayFile, ArrayWriter
from mistudio_train.training.report.entries import Entries
from mistudio_train.training.report.places import Place
from mistudio_train.training.report.windows import AFTER, BEFORE, fill, windows_around
from mistudio_train.training.tokens import RowIndex

LENGTHS = [3, 40, 1, 60, 25]
ROWS, D_SAE = sum(LENGTHS), 5


def array(path: Path, values: object, dtype: type) -> ArrayFile:
    with ArrayWriter(path, dtype) as writer:
        writer.append(values)
    return ArrayFile(path, dtype)


@pytest.fixture
def index(tmp_path: Path) -> RowIndex:
    texts = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    positions = np.concatenate([np.arange(length) for length in LENGTHS])
    return RowIndex(
        array(tmp_path / "starts", np.cumsum([0, *LENGTHS]), np.int64),
        array(tmp_path / "text", texts, np.int32),
        array(tmp_path / "position", positions, np.int32),
        array(tmp_path / "token", np.arange(ROWS), np.int32),
    )


@pytest.fixture
def acts() -> NDArray[np.float32]:
    generator = np.random.default_rng(1)
    dense = generator.random((ROWS, D_SAE)) * (generator.random((ROWS, D_SAE)) < 0.4)
    return dense.astype(np.float32)


def places(acts: NDArray[np.float32], each: int) -> Place:
    """The strongest of each feature, near each other or not."""
    feature = np.repeat(np.arange(D_SAE), each)
    row = np.concatenate([np.argsort(-acts[:, f], kind="stable")[:each] for f in range(D_SAE)])
    return Place(feature, row, acts[row, feature], np.zeros(len(row), np.int64))


def entries(acts: NDArray[np.float32], index: RowIndex) -> list[Entries]:
    row, feature = np.nonzero(acts)
    text, position = (np.array(one.read(0, ROWS), np.int64) for one in (index.text_of_row, index.position_of_row))
    pieces = np.array_split(np.arange(len(row)), 7)
    return [Entries(text[row[at]], position[row[at]], feature[at], acts[row[at], feature[at]]) for at in pieces]


def test_strengths_are_those_of_the_rows(acts: NDArray[np.float32], index: RowIndex) -> None:
    windows = windows_around(places(acts, 20), index, whole_texts=False)
    fill(windows, entries(acts, index), index)
    assert len(windows) > D_SAE
    for i in range(len(windows)):
        start, stop, feature = int(windows.start[i]), int(windows.stop[i]), int(windows.places.feature[i])
        assert np.array_equal(windows.strengths[i, : stop - start], acts[start:stop, feature])
        assert not windows.strengths[i, stop - start :].any()


def test_windows_end_with_their_text_and_do_not_overlap(acts: NDArray[np.float32], index: RowIndex) -> None:
    everywhere = places(acts, 20)
    windows = windows_around(everywhere, index, whole_texts=False)
    bounds = np.cumsum([0, *LENGTHS])
    for i in range(len(windows)):
        row, text = int(windows.places.row[i]), int(windows.text[i])
        assert (windows.start[i], windows.stop[i]) == (
            max(bounds[text], row - BEFORE),
            min(bounds[text + 1], row + AFTER + 1),
        )
    for feature in range(D_SAE):
        mine = np.flatnonzero(windows.places.feature == feature)
        assert windows.places.row[mine[0]] == everywhere.row[feature * 20]  # the strongest one is there
        order = mine[np.argsort(windows.start[mine])]
        assert np.all(windows.stop[order[:-1]] <= windows.start[order[1:]])


def test_whole_texts_have_no_neighbours(acts: NDArray[np.float32], index: RowIndex) -> None:
    windows = windows_around(places(acts, 3), index, whole_texts=True)
    assert np.array_equal(windows.stop - windows.start, np.ones(len(windows)))
    assert np.array_equal(windows.start, windows.places.row)


def test_nothing_to_show_is_no_error(acts: NDArray[np.float32], index: RowIndex) -> None:
    nothing = places(acts, 1).where(np.zeros(0, np.int64))
    windows = windows_around(nothing, index, whole_texts=False)
    fill(windows, entries(acts, index), index)
    assert len(windows) == 0
