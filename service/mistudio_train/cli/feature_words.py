"""A run's token-level feature store read as words: which feature is active on which word, and how strongly.

Owns what a word is and how tokens fall into words; judges no feature. Imported inside commands only: it loads numpy
and pyarrow.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .errors import CliError

WORD: Final = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")  # noqa: RUF001
"""A word with its apostrophes, or a run of punctuation."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Tokenized:
    """A text's tokens as the model saw them."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """Of each token: its first character, and the one after its last."""


Tokenize = Callable[[str], Tokenized]
"""Without special tokens."""


@dataclass(frozen=True)
class Words:
    """The words of all texts, numbered through. A word's name is the word in small letters."""

    texts: Sequence[str]
    spans: list[list[tuple[int, int]]]
    """Of each text: its words' first character, and the one after the last."""
    first: Ints
    """[texts + 1]: the number of each text's first word."""
    name: Ints
    """[words]: which of `names`."""
    names: list[str]
    """Each once."""

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Words":
        """Split the texts."""
        spans = [[found.span() for found in WORD.finditer(text)] or [(0, len(text))] for text in texts]
        known: dict[str, int] = {}
        name = [
            known.setdefault(text[begin:end].lower(), len(known))
            for text, own in zip(texts, spans, strict=True)
            for begin, end in own
        ]
        first = np.cumsum([0, *map(len, spans)], dtype=np.int64)
        return cls(texts, spans, first, np.array(name, dtype=np.int64), list(known))

    @property
    def text(self) -> Ints:
        """[words]: which text."""
        text: Ints = np.repeat(np.arange(len(self.texts)), np.diff(self.first))
        return text

    def of_tokens(self, text: int, offsets: Sequence[tuple[int, int]]) -> Ints:
        """The word that each token of a text ends in; of white space, the word before."""
        starts = np.array([begin for begin, _ in self.spans[text]])
        last = np.array([end - 1 for _, end in offsets], dtype=np.int64)
        words: Ints = np.maximum(np.searchsorted(starts, last, side="right") - 1, 0) + self.first[text]
        return words


@dataclass(frozen=True)
class Activations:
    """One entry for each feature and each word that it is active on; a feature's entries the strongest first."""

    feature: Ints
    text: Ints
    word: Ints
    strength: NDArray[np.float32]
    """The highest of the word's tokens."""

    def __len__(self) -> int:
        return len(self.feature)

    def where(self, chosen: NDArray[np.bool_] | Ints) -> "Activations":
        """The chosen entries, in the order chosen."""
        return Activations(self.feature[chosen], self.text[chosen], self.word[chosen], self.strength[chosen])

    def by_feature(self) -> Iterator[tuple[int, "Activations"]]:
        """Each feature's own entries."""
        features, starts, sizes = np.unique(self.feature, return_index=True, return_counts=True)
        for number, start, size in zip(features.tolist(), starts, sizes, strict=True):
            yield number, self.where(np.arange(start, start + size))

    def best_of_texts(self, count: int) -> "Activations":
        """One feature's strongest entry in each of the `count` texts where it is strongest."""
        _, first = np.unique(self.text, return_index=True)
        return self.where(np.sort(first)[:count])


def read_activations(store: Path, words: Words, tokenize: Tokenize) -> Activations:
    """The features' activations on words.

    Args:
        store: the `features/activations.parquet` of a token-pooled run.
        words: of the run's texts, in order.
        tokenize: by the model's tokenizer.

    Raises:
        CliError: if the store was not made of these texts by this tokenizer.

    """
    text, position, token, feature = (
        pq.read_table(store, columns=[name])[name].to_numpy().astype(np.int64)
        for name in ("text", "position", "token_id", "feature")
    )
    strength: NDArray[np.float32] = pq.read_table(store, columns=["activation"])["activation"].to_numpy()
    tokenized = [tokenize(one) for one in words.texts]
    first = np.cumsum([0, *(len(one.ids) for one in tokenized)])
    ids = np.concatenate([np.array(one.ids, dtype=np.int64) for one in tokenized])
    at = first[np.minimum(text, len(tokenized))] + position
    if len(at) and (int(at.max()) >= len(ids) or not np.array_equal(ids[at], token)):
        raise CliError(f"{store} is not of these texts and this model", "Give the run's own corpus and model.")
    word = np.concatenate([words.of_tokens(number, one.offsets) for number, one in enumerate(tokenized)])[at]
    return strongest(feature, text, word, strength)


def strongest(feature: Ints, text: Ints, word: Ints, strength: NDArray[np.float32]) -> Activations:
    """Of the entries of one feature on one word the strongest; a feature's entries in the order of strength."""
    order = np.lexsort((-strength, word, feature))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(feature[order]) != 0) | (np.diff(word[order]) != 0)
    kept = order[new]
    kept = kept[np.lexsort((word[kept], -strength[kept], feature[kept]))]
    return Activations(feature[kept], text[kept], word[kept], strength[kept])
