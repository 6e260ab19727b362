"""A store of token activations becomes activations on words; worked out by hand."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mistudio_train.cli.errors import CliError
from mistudio_train.cli.feature_words import Activations, Tokenized, Words, read_activations

TEXTS = ["Kings don't walk.", "Two kings"]
TOKENS = {
    # "king" "s" " don" "'t" " walk" "."
    TEXTS[0]: Tokenized([10, 11, 12, 13, 14, 15], [(0, 4), (4, 5), (5, 9), (9, 11), (11, 16), (16, 17)]),
    TEXTS[1]: Tokenized([16, 17, 18], [(0, 3), (3, 4), (4, 9)]),
}


def store(path: Path, *entries: tuple[int, int, int, int, float]) -> Path:
    names = ("text", "position", "token_id", "feature", "activation")
    pq.write_table(pa.Table.from_pylist([dict(zip(names, entry, strict=True)) for entry in entries]), path)
    return path


def listed(found: Activations) -> list[tuple[int, int, int, float]]:
    columns = (found.feature, found.text, found.word, found.strength)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_texts_are_split_into_words_with_their_apostrophes() -> None:
    words = Words.of(TEXTS)
    assert [[text[a:b] for a, b in own] for text, own in zip(TEXTS, words.spans, strict=True)] == [
        ["Kings", "don't", "walk", "."],
        ["Two", "kings"],
    ]
    assert words.names == ["kings", "don't", "walk", ".", "two"]
    assert words.name.tolist() == [0, 1, 2, 3, 4, 0]
    assert words.first.tolist() == [0, 4, 6]
    assert words.text.tolist() == [0, 0, 0, 0, 1, 1]


def test_a_token_belongs_to_the_word_that_it_ends_in() -> None:
    words = Words.of(TEXTS)
    assert words.of_tokens(0, TOKENS[TEXTS[0]].offsets).tolist() == [0, 0, 1, 1, 2, 3]
    # the space between two words is the earlier word's
    assert words.of_tokens(1, TOKENS[TEXTS[1]].offsets).tolist() == [4, 4, 5]


def test_a_word_is_as_strong_as_its_strongest_token(tmp_path: Path) -> None:
    path = store(
        tmp_path / "activations.parquet",
        (0, 0, 10, 7, 1.0),
        (0, 1, 11, 7, 3.0),  # the same word, stronger
        (0, 3, 13, 7, 5.0),
        (0, 3, 13, 2, 0.5),
        (1, 2, 18, 7, 4.0),
    )
    found = read_activations(path, Words.of(TEXTS), TOKENS.__getitem__)
    assert listed(found) == [(2, 0, 1, 0.5), (7, 0, 1, 5.0), (7, 1, 5, 4.0), (7, 0, 0, 3.0)]
    (_, own) = list(found.by_feature())[1]
    assert listed(own.best_of_texts(2)) == [(7, 0, 1, 5.0), (7, 1, 5, 4.0)]


@pytest.mark.parametrize("entry", [(0, 0, 99, 7, 1.0), (1, 3, 10, 7, 1.0), (2, 0, 10, 7, 1.0)])
def test_a_store_of_other_texts_is_refused(tmp_path: Path, entry: tuple[int, int, int, int, float]) -> None:
    path = store(tmp_path / "activations.parquet", entry)
    with pytest.raises(CliError, match="not of these texts"):
        read_activations(path, Words.of(TEXTS), TOKENS.__getitem__)
