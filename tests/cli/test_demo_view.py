"""Contexts are cut and marked as worked out by hand, and come only from texts that nothing was chosen by."""

import numpy as np
import pytest
from rich.console import Console

from mistudio_train.cli.feature_choice import Meaning, Rule, halves
from mistudio_train.cli.feature_view import context, strongest_words, view_features
from mistudio_train.cli.feature_words import Activations, Words, strongest

LETTERS = "a b c d e f g h i j k l m n o p q r s t"


def activations(*entries: tuple[int, int, int, float]) -> Activations:
    """Of (feature, text, word, strength)."""
    feature, text, word, strength = (np.array(column) for column in zip(*entries, strict=True))
    return strongest(feature, text, word, strength.astype(np.float32))


def test_a_context_is_cut_around_the_strongest_word() -> None:
    words = Words.of([LETTERS])
    found = context(activations((0, 0, 10, 4.0)), words, 0, highest=8.0)
    assert found.marked == "… c d e f g h i j «k» l m n o …"
    assert found.activation == 4.0
    assert [(piece.text, piece.strength) for piece in found.pieces if piece.strength] == [("k", 0.5)]


def test_a_context_ends_where_its_text_does() -> None:
    words = Words.of(["x y", "the sea, and all"])
    found = context(activations((0, 1, 3, 2.0)), words, 1, highest=2.0)
    assert found.marked == "the «sea», and all"


def test_weaker_words_are_marked_down_to_a_share_of_the_strongest() -> None:
    words = Words.of([LETTERS])
    found = context(activations((0, 0, 2, 10.0), (0, 0, 3, 3.0), (0, 0, 5, 2.9)), words, 0, highest=10.0)
    assert found.marked == "a b «c» «d» e f g …"


def test_what_a_terminal_would_obey_is_taken_out_and_nothing_is_markup() -> None:
    words = Words.of(["[bold]red\x1b[31m [/] end"])
    sea = words.names.index("red")
    found = context(activations((0, 0, sea, 1.0)), words, 0, highest=1.0)
    console = Console(width=80, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(found.rich())
    assert capture.get() == "[bold]«red» [31m [/] end\n"


@pytest.fixture
def texts() -> list[str]:
    """Twenty, of which each says "seven" or "ten" and its own number."""
    return [f"{'seven' if number % 2 else 'ten'} days and {number} nights" for number in range(20)]


def test_what_is_shown_is_not_what_was_picked(texts: list[str]) -> None:
    words, to_choose = Words.of(texts), halves(texts)
    assert 0 < to_choose.sum() < len(texts)
    meaning = Meaning(np.ones((len(words.names), 1), dtype=np.float32), np.ones(len(words.names), dtype=bool))
    rule = Rule(texts=2, frequency=1.0, distinct=2, on_one_word=1.0)
    # feature 1 is active on the first word of every text; feature 2 only in texts of the half that is shown
    everywhere = [(1, text, int(words.first[text]), 1.0 + text) for text in range(20)]
    unseen = [(2, text, int(words.first[text]), 9.0) for text in range(20) if not to_choose[text]]
    (found,) = view_features(activations(*everywhere, *unseen), words, meaning, contexts=3, rule=rule)
    shown = [text for text in reversed(range(20)) if not to_choose[text]][:3]
    assert found.feature == 1
    assert [one.text for one in found.contexts] == shown
    assert [one.marked for one in found.contexts] == [
        texts[text].replace("seven", "«seven»").replace("ten", "«ten»") for text in shown
    ]
    assert found.frequency == pytest.approx(1 / 5)
    assert set(found.words) == {"seven", "ten"}


def test_a_feature_that_is_silent_in_the_other_half_is_shown_as_silent(texts: list[str]) -> None:
    words, to_choose = Words.of(texts), halves(texts)
    meaning = Meaning(np.ones((len(words.names), 1), dtype=np.float32), np.ones(len(words.names), dtype=bool))
    picked = [(1, text, int(words.first[text]), 1.0) for text in range(20) if to_choose[text]]
    rule = Rule(texts=2, frequency=1.0, distinct=1, on_one_word=1.0)
    (found,) = view_features(activations(*picked), words, meaning, rule=rule)
    assert (found.frequency, found.words, found.contexts) == (0.0, [], [])


def test_the_words_of_the_strongest_places_are_named_the_most_frequent_first() -> None:
    words = Words.of(["Ten", "seven", "ten", "days"])
    own = activations((0, 0, 0, 1.0), (0, 1, 1, 4.0), (0, 2, 2, 2.0), (0, 3, 3, 3.0))
    assert strongest_words(own, words) == ["ten", "seven", "days"]
