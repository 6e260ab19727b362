"""Chooses features that a person can read, and the texts to show them by, from a run's sparse feature store.

Chosen on one half of the texts and shown from the other, so that what is seen is not what was picked. Trains nothing;
imported inside commands only, as it loads numpy, pyarrow and a tokenizer.
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

WORD: Final = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]+")
PLAIN: Final = re.compile(r"[a-z]{3,}")
TOP: Final = 12
"""A feature is judged by its strongest words in so many texts of the first half."""
MIN_TEXTS: Final = 8
MAX_FREQUENCY: Final = 0.01
"""Of the words; a feature that is active more often is no single idea."""
MAX_ONE_WORD: Final = 0.6
"""Of its strongest words; beyond that it is a word, not an idea."""
MIN_WORDS: Final = 4
MIN_PLAIN: Final = 0.75
MAX_SHARED: Final = 0.34
"""Of the word stems of two features that are both shown."""
STEM: Final = 4
BEFORE, AFTER = 8, 4
"""Words of context around the strongest word."""


@dataclass(frozen=True)
class Mark:
    """One occurrence: the text around a word, and how strongly the feature is active on it."""

    before: str
    word: str
    after: str
    strength: float
    """0 to 1, of the feature's strongest activation."""


@dataclass(frozen=True)
class FeatureCard:
    """One feature, as it is shown."""

    feature: int
    score: float
    """Likeness in meaning of its strongest words, times how evenly strong they are."""
    frequency: float
    """Share of the words on which it is active."""
    words: list[str]
    """Its strongest distinct words in the half that it was chosen on."""
    marks: list[Mark]
    """Its strongest occurrences in the other half, one a text."""


@dataclass(frozen=True)
class Words:
    """The words of all texts in one sequence, and which token of which text lies in which."""

    texts: Sequence[str]
    spans: list[list[tuple[int, int]]]
    """Of each text, each word's place in it."""
    first_word: NDArray[np.int64]
    """Of each text."""
    first_token: NDArray[np.int64]
    word_of_token: NDArray[np.int64]
    name_of_word: NDArray[np.int64]
    """Index into `names`."""
    names: list[str]
    """Distinct words, in small letters."""
    common: NDArray[np.bool_]
    """Whether each distinct word is plain letters, and common enough to be one token of the model's."""


@dataclass(frozen=True)
class Activations:
    """The strongest activation of each feature on each word."""

    feature: NDArray[np.int64]
    text: NDArray[np.int64]
    word: NDArray[np.int64]
    strength: NDArray[np.float32]

    def where(self, chosen: NDArray[Any]) -> "Activations":
        """The chosen ones, in the order chosen."""
        return Activations(self.feature[chosen], self.text[chosen], self.word[chosen], self.strength[chosen])

    def by_feature(self) -> Iterator[tuple[int, "Activations"]]:
        """Each feature's own, the strongest first."""
        ordered = self.where(np.lexsort((-self.strength, self.feature)))
        features, starts = np.unique(ordered.feature, return_index=True)
        for number, part in zip(features.tolist(), np.split(np.arange(len(ordered.feature)), starts[1:]), strict=True):
            yield number, ordered.where(part)

    def one_a_text(self, count: int) -> "Activations":
        """The strongest of each of the first texts, given the strongest first."""
        _, first = np.unique(self.text, return_index=True)
        return self.where(np.sort(first)[:count])


def feature_cards(
    store: Path, texts: Sequence[str], tokenizer: Any, meaning: NDArray[np.float32], *, count: int = 10, marks: int = 4
) -> list[FeatureCard]:
    """The features that look most interpretable, the best first.

    Args:
        store: the run's `features/activations.parquet`, of a token-pooled job.
        texts: of the run, in order.
        tokenizer: the model's, fast.
        meaning: the model's token embeddings [vocabulary, width]: words of like meaning are near each other.
        count: features wanted.
        marks: occurrences of each.
    """
    words = read_words(texts, tokenizer)
    activations = read_activations(store, words)
    picked = np.array([zlib.crc32(text.encode()) % 2 == 0 for text in texts])
    chosen_from = activations.where(picked[activations.text])
    shown_from = dict(activations.where(~picked[activations.text]).by_feature())
    vectors = word_vectors(words.names, tokenizer, meaning)
    total = int(picked[np.repeat(np.arange(len(texts)), np.diff(words.first_word))].sum())
    cards = []
    for number, own in chosen_from.by_feature():
        top = own.one_a_text(TOP)
        frequency = len(own.word) / total
        if number not in shown_from or frequency > MAX_FREQUENCY or not is_readable(top, words):
            continue
        others = shown_from[number].one_a_text(marks)
        strongest = float(max(own.strength[0], others.strength[0]))
        shown = [mark(words, others, i, strongest) for i in range(len(others.word))]
        cards.append(FeatureCard(number, score(top, words, vectors), frequency, distinct_words(top, words), shown))
    return diverse(sorted(cards, key=lambda card: -card.score), count)


def read_words(texts: Sequence[str], tokenizer: Any) -> Words:
    """Split the texts into words, and find the word that each token ends in."""
    spans, of_token, counts = [], [], []
    numbers: list[int] = []
    known: dict[str, int] = {}
    for text in texts:
        own = [found.span() for found in WORD.finditer(text)] or [(0, len(text))]
        starts = np.array([start for start, _ in own])
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        last = np.array([end - 1 for _, end in offsets], dtype=np.int64)
        of_token.append(np.maximum(np.searchsorted(starts, last, side="right") - 1, 0) + len(numbers))
        numbers += [known.setdefault(text[a:b].lower(), len(known)) for a, b in own]
        spans.append(own)
        counts.append(len(offsets))
    names = list(known)
    ids = tokenizer([f" {name}" for name in names], add_special_tokens=False)["input_ids"]
    common = [len(one) == 1 and PLAIN.fullmatch(name) is not None for one, name in zip(ids, names, strict=True)]
    first_word = np.concatenate([[0], np.cumsum([len(own) for own in spans])])
    first_token = np.concatenate([[0], np.cumsum(counts)])
    return Words(
        texts, spans, first_word, first_token, np.concatenate(of_token), np.array(numbers), names, np.array(common)
    )


def read_activations(store: Path, words: Words) -> Activations:
    """The store's entries, the strongest for each feature and word."""
    table = pq.read_table(store, columns=["text", "position", "feature", "activation"])
    text, position, feature = (table[name].to_numpy().astype(np.int64) for name in ("text", "position", "feature"))
    strength = table["activation"].to_numpy()
    word = words.word_of_token[words.first_token[text] + position]
    order = np.lexsort((-strength, word, feature))
    feature, word, text, strength = feature[order], word[order], text[order], strength[order]
    new = np.ones(len(order), bool)
    new[1:] = (feature[1:] != feature[:-1]) | (word[1:] != word[:-1])
    return Activations(feature[new], text[new], word[new], strength[new])


def word_vectors(names: list[str], tokenizer: Any, meaning: NDArray[np.float32]) -> NDArray[np.float32]:
    """A unit vector a word: the mean embedding of its tokens, the mean of all embeddings taken away."""
    centred = meaning - meaning.mean(0)
    ids = tokenizer([f" {name}" for name in names], add_special_tokens=False)["input_ids"]
    vectors = np.stack([centred[one].mean(0) if one else np.zeros(centred.shape[1]) for one in ids])
    unit: NDArray[np.float32] = (vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-9)).astype(np.float32)
    return unit


def is_readable(top: Activations, words: Words) -> bool:
    """Whether the strongest words are enough, plain, and not all the same."""
    names = [words.names[number] for number in words.name_of_word[top.word]]
    stems = [name[:STEM] for name in names]
    commonest = max(stems.count(stem) for stem in stems) / len(stems)
    plain = float(words.common[words.name_of_word[top.word]].mean())
    enough = len(names) >= MIN_TEXTS and len(set(stems)) >= MIN_WORDS
    return enough and commonest <= MAX_ONE_WORD and plain >= MIN_PLAIN


def score(top: Activations, words: Words, vectors: NDArray[np.float32]) -> float:
    """Mean cosine of pairs of strongest words with different stems, times the weakest strength over the strongest."""
    names = words.name_of_word[top.word]
    stems = np.array([words.names[number][:STEM] for number in names])
    different = stems[:, None] != stems[None, :]
    cosine = vectors[names] @ vectors[names].T
    return float(cosine[different].mean() * top.strength[-1] / top.strength[0])


def distinct_words(top: Activations, words: Words) -> list[str]:
    """Each once, in order of strength."""
    return list(dict.fromkeys(words.names[number] for number in words.name_of_word[top.word]))


def mark(words: Words, found: Activations, i: int, strongest: float) -> Mark:
    """The i-th occurrence with some words around it."""
    text, spans = words.texts[found.text[i]], words.spans[found.text[i]]
    at = int(found.word[i] - words.first_word[found.text[i]])
    begin, end = spans[max(0, at - BEFORE)][0], spans[min(len(spans) - 1, at + AFTER)][1]
    a, b = spans[at]
    return Mark(text[begin:a], text[a:b], text[b:end], float(found.strength[i]) / strongest)


def diverse(cards: list[FeatureCard], count: int) -> list[FeatureCard]:
    """The first `count` cards that are not much like one before."""
    kept: list[tuple[set[str], FeatureCard]] = []
    for card in cards:
        stems = {word[:STEM] for word in card.words}
        if all(len(stems & other) <= MAX_SHARED * min(len(stems), len(other)) for other, _ in kept):
            kept.append((stems, card))
        if len(kept) == count:
            break
    return [card for _, card in kept]
