"""Which features look as if a reader could name them, judged on some of the texts only. It shows none.

What is seen must not be what was picked: `halves` parts the texts, and nothing here looks beyond what it is given.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .feature_words import Activations, Ints, Words

STEM: Final = 4
"""Words that share so many first letters count as forms of one word."""


@dataclass(frozen=True)
class Rule:
    """What a feature must have to be judged at all."""

    texts: int = 12
    """It is active on at least so many texts."""
    top: int = 18
    """It is judged by its strongest word in each of so many texts where it is strongest."""
    frequency: float = 0.01
    """It is active on at most this share of the words: what is active more often is no single idea."""
    on_one_word: float = 0.6
    """At most this share of its strongest words are the same one."""
    distinct: int = 3
    """So many of them differ."""
    plain: float = 0.8
    """At least this share of them are plain words."""
    shared: float = 0.34
    """A feature is left out if more than this share of its stems, or of a better one's, are common to both."""


@dataclass(frozen=True)
class Meaning:
    """What is known of each of `Words.names`."""

    vectors: NDArray[np.float32]
    """[names, width], of norm 1: words of like meaning are near each other."""
    plain: NDArray[np.bool_]
    """[names]: whether it is a word with a meaning of its own: no number, sign or rare name, no 'the' or 'also'."""


@dataclass(frozen=True)
class Choice:
    """A feature that was chosen, and why."""

    feature: int
    score: float
    stems: frozenset[str]
    """Of the words that it was chosen by."""


def halves(texts: Sequence[str]) -> NDArray[np.bool_]:
    """Of each text whether it belongs to the half to choose from. By its content, so that equal texts never part."""
    return np.array([zlib.crc32(text.encode()) % 2 == 0 for text in texts], dtype=bool)


def choose(
    activations: Activations, words: Words, total: int, meaning: Meaning, count: int, rule: Rule | None = None
) -> list[Choice]:
    """The features that look most nameable, the best first; fewer than `count` if too few pass the rule.

    A feature's score is the product of three numbers about its strongest words: how near they are in meaning (mean
    cosine of all pairs), how evenly strong (the weakest over the strongest), and the square root of their variety (the
    exponential of the entropy of their stems). So a feature on "ten, seven, twelve" comes before one on "ten" alone,
    and both before one on words that nothing connects.

    Args:
        activations: on the texts to choose from.
        words: of all texts.
        total: how many words those texts have.
        meaning: of the words' names.
        count: how many features are wanted.
        rule: what each must have; `None`: the defaults.

    """
    rule = rule or Rule()
    candidates = []
    for feature, own in activations.by_feature():
        top = words.name[own.best_of_texts(rule.top).word]
        if len(own) <= rule.frequency * total and len(np.unique(own.text)) >= rule.texts and passes(top, meaning, rule):
            even = float(own.best_of_texts(rule.top).strength[-1] / own.strength[0])
            stems = [words.names[name][:STEM] for name in top]
            score = nearness(top, meaning) * even * variety(stems) ** 0.5
            candidates.append(Choice(feature, score, frozenset(stems)))
    return diverse(sorted(candidates, key=lambda one: (-one.score, one.feature)), count, rule.shared)


def passes(top: Ints, meaning: Meaning, rule: Rule) -> bool:
    """Whether a feature's strongest words, by name, are plain, different, and not mostly one."""
    counts = np.unique(top, return_counts=True)[1]
    plain = float(meaning.plain[top].mean())
    return plain >= rule.plain and len(counts) >= rule.distinct and counts.max() <= rule.on_one_word * len(top)


def nearness(names: Ints, meaning: Meaning) -> float:
    """Mean cosine of all pairs of words, a word with itself included: the squared length of their mean vector."""
    return float(np.square(meaning.vectors[names].mean(0)).sum())


def variety(stems: Sequence[str]) -> float:
    """How many different stems there are in effect: the exponential of their entropy."""
    shares = np.unique(stems, return_counts=True)[1] / len(stems)
    return float(np.exp(-(shares * np.log(shares)).sum()))


def diverse(ranked: Sequence[Choice], count: int, shared: float) -> list[Choice]:
    """The first `count` that do not look like one before them."""
    kept: list[Choice] = []
    for one in ranked:
        if len(kept) == count:
            break
        if all(len(one.stems & other.stems) <= shared * min(len(one.stems), len(other.stems)) for other in kept):
            kept.append(one)
    return kept
