"""Which rows are trained on, against what the tokens say, for rows with and without a special token before them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mistudio_schemas import TrainRequested
from mistudio_train.training.activations import ActivationStore, ActivationWriter, Layout
from mistudio_train.training.selection import FIRST_TOKEN, HELD_OUT, HIGH_NORM, Selection, hold_out, select
from mistudio_train.training.texts import Texts, TextsWriter
from mistudio_train.training.tokenization import tokenize
from mistudio_train.training.tokens import Frame, Rules, Tokens

WIDTH = 4
SINKS = (5, 17)
"""Rows that are ten times as long as the others."""


class Characters:
    """A tokenizer that makes a token of each character."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


def texts_of(folder: Path, texts: list[str]) -> Texts:
    with TextsWriter(folder) as writer:
        for text in texts:
            writer.append(text)
    return Texts(folder)


def tokens_of(folder: Path, texts: list[str], **rules: Any) -> Tokens:
    options: dict[str, Any] = {"pooling": "token", "include_special_tokens": False, "length": 8, "frame": Frame((), ())}
    return tokenize(
        texts_of(folder / "texts", texts), Characters(), Rules(**options | rules), folder / "tokens", lambda *_: None
    )


def store_of(folder: Path, tokens: Tokens) -> ActivationStore:
    rows = torch.ones(tokens.corpus.rows, WIDTH)
    rows[[row for row in SINKS if row < len(rows)]] *= 10
    writer = ActivationWriter(folder / "store", Layout(WIDTH, torch.float32, (0, len(rows))))
    writer.write(0, rows)
    return writer.finish(tokens.index)


def request(**fields: Any) -> TrainRequested:
    return TrainRequested.model_validate(
        {"model_name": "m", "corpus_file": "c.txt", "pooling": "token", "sae": {"kind": "topk"}} | fields
    )


def selected(folder: Path, texts: list[str], fields: dict[str, Any] | None = None, **rules: Any) -> Selection:
    tokens = tokens_of(folder, texts, **rules)
    asked = request(**{"held_out": 0.2} | (fields or {}))
    held_out = hold_out(texts_of(folder / "again", texts), tokens, asked.held_out_share)
    return select([store_of(folder, tokens)], tokens, held_out, asked, folder / "rows.bin", lambda done: None)


def bits(selection: Selection, bit: int) -> NDArray[np.int64]:
    return np.flatnonzero(selection.flags.read(0, len(selection.flags)) & bit)


TEXTS = [f"{'abcdefghijkl'[: 3 + i % 9]}{i}" for i in range(60)]


def test_every_row_is_one_thing_and_the_counts_say_so(tmp_path: Path) -> None:
    selection = selected(tmp_path, TEXTS)
    rows = selection.counts
    assert rows.training + rows.held_out + rows.left_out == rows.total == sum(map(len, TEXTS))
    assert int(selection.training(0, rows.total).sum()) == rows.training
    assert len(selection.held_out_rows(10**6)) == rows.held_out
    assert selection.training_per_block(7).sum() == rows.training
    assert rows.median_norm == pytest.approx(2.0)
    assert rows.high_norm == 2
    assert bits(selection, HIGH_NORM).tolist() == list(SINKS)


def test_the_first_token_of_each_window_is_found(tmp_path: Path) -> None:
    expected, row = [], 0
    for text in TEXTS:
        expected += list(range(row, row + len(text), 8))  # of windows of eight tokens
        row += len(text)
    assert bits(selected(tmp_path, TEXTS), FIRST_TOKEN).tolist() == expected


def test_a_text_behind_a_special_token_has_no_first_token(tmp_path: Path) -> None:
    assert not len(bits(selected(tmp_path, TEXTS, frame=Frame((1,), ())), FIRST_TOKEN))


def test_a_special_token_that_is_a_row_is_the_first(tmp_path: Path) -> None:
    selection = selected(tmp_path, ["abc", "de"], frame=Frame((1,), (2,)), include_special_tokens=True)
    assert bits(selection, FIRST_TOKEN).tolist() == [0, 5]


@pytest.mark.parametrize(
    ("left_out", "kept"),
    [
        (["first_token", "high_norm"], lambda flags: flags & (FIRST_TOKEN | HIGH_NORM) == 0),
        (["first_token"], lambda flags: flags & FIRST_TOKEN == 0),
        (["high_norm"], lambda flags: flags & HIGH_NORM == 0),
        ([], lambda flags: flags >= 0),
    ],
)
def test_what_is_left_out_is_neither_trained_on_nor_held_out(
    tmp_path: Path, left_out: list[str], kept: Callable[[NDArray[np.uint8]], NDArray[np.bool_]]
) -> None:
    selection = selected(tmp_path, TEXTS, {"left_out": left_out})
    flags = selection.flags.read(0, len(selection.flags))
    expected = kept(flags)
    assert np.array_equal(selection.training(0, len(flags)), expected & (flags & HELD_OUT == 0))
    assert np.array_equal(selection.held_out_rows(10**6), np.flatnonzero(expected & (flags & HELD_OUT != 0)))
    assert selection.counts.left_out == int((~expected).sum())


def test_where_most_rows_would_be_left_out_none_is(tmp_path: Path) -> None:
    selection = selected(tmp_path, ["a", "b", "c", "d", "e", "fg"])
    assert (selection.counts.left_out, selection.left_out) == (0, 0)
    assert selection.counts.first_token == 6


def test_a_mean_has_no_first_token_and_no_norm_to_judge_it_by(tmp_path: Path) -> None:
    selection = selected(tmp_path, TEXTS, {"pooling": "mean"}, pooling="mean", length=512)
    rows = selection.counts
    assert (rows.total, rows.left_out, rows.first_token, rows.high_norm, rows.median_norm) == (60, 0, 0, 0, None)
    assert rows.training + rows.held_out == 60


def test_held_out_are_whole_texts_about_as_many_as_asked_for(tmp_path: Path) -> None:
    selection = selected(tmp_path, TEXTS, {"left_out": []})
    total = selection.counts.total
    assert 0.1 * total < selection.counts.held_out < 0.4 * total
    row = 0
    for text in TEXTS:
        assert len(set((selection.flags.read(row, row + len(text)) & HELD_OUT).tolist())) == 1
        row += len(text)


def held_out(folder: Path, texts: list[str], share: float) -> NDArray[np.bool_]:
    return hold_out(texts_of(folder / "t", texts), tokens_of(folder, texts), share)


def test_the_same_text_is_on_the_same_side_wherever_it_stands(tmp_path: Path) -> None:
    there = held_out(tmp_path / "a", TEXTS, 0.2)
    again = held_out(tmp_path / "b", TEXTS[::-1], 0.2)
    twice = held_out(tmp_path / "c", TEXTS * 2, 0.2)
    assert there.any()
    assert np.array_equal(there, again[::-1])
    assert np.array_equal(twice[:60], twice[60:])


def test_many_texts_are_told_apart_without_their_number(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(12_000)]
    share = held_out(tmp_path / "a", texts, 0.05)
    assert share.mean() == pytest.approx(0.05, abs=0.01)
    assert np.array_equal(held_out(tmp_path / "b", texts[1000:], 0.05), share[1000:])


@pytest.mark.parametrize(("texts", "number"), [(["only one"], 0), (["a b", "c d"], 1), (["a"] * 5, 0), (["a", "b"], 1)])
def test_of_a_few_texts_one_is_held_out_and_never_all(tmp_path: Path, texts: list[str], number: int) -> None:
    assert held_out(tmp_path, texts, 0.05).sum() == number


def test_a_text_that_is_half_of_everything_is_trained_on(tmp_path: Path) -> None:
    texts = ["x" * 400, *(f"{i:04d}" for i in range(100))]
    share = held_out(tmp_path, texts, 0.05)
    assert not share[0]
    assert 3 <= share.sum() <= 12


def test_the_seeds_requests_hold_nothing_out() -> None:
    seed = TrainRequested(model_name="m", corpus_file="c.txt")
    assert (seed.held_out_share, request().held_out_share) == (0, 0.05)
    assert request(held_out=0).held_out_share == 0
