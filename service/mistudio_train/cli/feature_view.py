"""Features for people: each with the places where it is strongest, its words marked in their context.

Brings choosing and showing together; the one sees one half of the texts, the other the other half.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from rich.text import Text

from .feature_choice import Meaning, Rule, choose, halves
from .feature_words import Activations, Words

BEFORE: Final = 8
AFTER: Final = 4
"""Words around the strongest one; more before it, since a causal model has seen no other."""
NAMED_PLACES: Final = 18
"""Of so many texts the strongest words are counted."""
NAMED_WORDS: Final = 6
"""So many of them are named."""
LEAST_MARK: Final = 0.3
"""A further word is marked from this share of its context's strongest one."""
STYLES: Final = ((0.75, "bold yellow"), (0.5, "yellow"), (0.0, "dim yellow"))
"""From which strength on a mark looks how."""


@dataclass(frozen=True)
class Piece:
    """Some characters of a context."""

    text: str
    strength: float
    """Of a marked word: its activation over the feature's highest that is shown; 0 where nothing is marked."""


@dataclass(frozen=True)
class Context:
    """A place in a text where a feature is strong."""

    text: int
    """Which text of the corpus, from 0."""
    activation: float
    """Of its strongest word."""
    pieces: list[Piece]
    """In order; together they are the context."""

    @property
    def marked(self) -> str:
        """The context with its words between « and »."""
        return "".join(f"«{piece.text}»" if piece.strength else piece.text for piece in self.pieces)

    def rich(self) -> Text:
        """The same in colours. No character of a text is taken as markup."""
        line = Text()
        for piece in self.pieces:
            style = next(style for least, style in STYLES if piece.strength >= least) if piece.strength else ""
            line.append(f"«{piece.text}»" if piece.strength else piece.text, style)
        return line


@dataclass(frozen=True)
class FeatureView:
    """A feature as it is shown."""

    feature: int
    score: float
    """By which it was chosen, from the other half of the texts."""
    frequency: float
    """Share of the shown half's words on which it is active."""
    words: list[str]
    """Of the shown half, what it is strongest on; the most frequent first, in small letters."""
    contexts: list[Context]
    """The strongest first, one a text; none where it is silent in this half."""


def view_features(
    activations: Activations,
    words: Words,
    meaning: Meaning,
    *,
    count: int = 10,
    contexts: int = 3,
    rule: Rule | None = None,
) -> list[FeatureView]:
    """The features that look most nameable on one half of the texts, as they are on the other; best first."""
    to_choose = halves(words.texts)
    sizes = np.bincount(to_choose[words.text].astype(int), minlength=2)
    chosen = choose(activations.where(to_choose[activations.text]), words, int(sizes[1]), meaning, count, rule)
    shown = dict(activations.where(~to_choose[activations.text]).by_feature())
    nothing = activations.where(np.zeros(0, dtype=np.int64))
    return [
        FeatureView(
            feature=one.feature,
            score=one.score,
            frequency=len(own := shown.get(one.feature, nothing)) / max(1, int(sizes[0])),
            words=strongest_words(own, words),
            contexts=strongest_contexts(own, words, contexts),
        )
        for one in chosen
    ]


def strongest_words(own: Activations, words: Words) -> list[str]:
    """The words of one feature's strongest places, one place a text; equally frequent ones by strength."""
    names = words.name[own.best_of_texts(NAMED_PLACES).word].tolist()
    return [words.names[name] for name, _ in Counter(names).most_common(NAMED_WORDS)]


def strongest_contexts(own: Activations, words: Words, count: int) -> list[Context]:
    """Where one feature is strongest, at most one context a text."""
    best = own.best_of_texts(count)
    return [
        context(own.where(own.text == text), words, int(text), highest=float(own.strength[0])) for text in best.text
    ]


def context(own: Activations, words: Words, text: int, *, highest: float) -> Context:
    """The words around one feature's strongest place in a text.

    Args:
        own: its entries on that text, the strongest first.
        words: of all texts.
        text: which.
        highest: the activation that counts as 1.

    """
    spans, first = words.spans[text], int(words.first[text])
    centre, peak = int(own.word[0]) - first, float(own.strength[0])
    begin, end = max(0, centre - BEFORE), min(len(spans), centre + AFTER + 1)
    marks = {
        word - first: strength / highest
        for word, strength in zip(own.word.tolist(), own.strength.tolist(), strict=True)
        if strength >= LEAST_MARK * peak
    }
    return Context(text, peak, pieces(words.texts[text], spans, range(begin, end), marks))


def pieces(text: str, spans: Sequence[tuple[int, int]], window: range, marks: dict[int, float]) -> list[Piece]:
    """The window's characters, cut at marked words, which are given with their strengths."""
    found = [Piece("… ", 0.0)] if window.start else []
    at = spans[window.start][0]
    for number in window:
        if number in marks:
            begin, end = spans[number]
            found += [Piece(printable(text[at:begin]), 0.0)] if at < begin else []
            found.append(Piece(printable(text[begin:end]), marks[number]))
            at = end
    last = spans[window.stop - 1][1]
    rest = printable(text[at:last]) + (" …" if window.stop < len(spans) else "")
    return [*found, Piece(rest, 0.0)] if rest else found


def printable(text: str) -> str:
    """Without line ends, and without what a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text)
