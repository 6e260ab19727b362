"""Which features are chosen, by scores worked out by hand, and from which half of the texts."""

import math
from itertools import chain

import numpy as np
import pytest

from mistudio_train.cli.feature_choice import Choice, Meaning, Rule, choose, diverse, halves, nearness, variety
from mistudio_train.cli.feature_words import Activations, Words, strongest

SEVEN, TEN, SEA, BREAD = range(4)
WORDS = ["seven", "ten", "sea", "bread"]
MEANING = Meaning(
    # seven and ten are near each other, sea and bread far from them and from each other
    vectors=np.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=np.float32),
    plain=np.ones(4, dtype=bool),
)
RULE = Rule(texts=3, top=4, frequency=0.5, distinct=2)


def activations(*entries: tuple[int, int, int, float]) -> Activations:
    """Of (feature, text, word, strength)."""
    feature, text, word, strength = (np.array(column) for column in zip(*entries, strict=True))
    return strongest(feature, text, word, strength.astype(np.float32))


def words(texts: int) -> Words:
    """So many texts of all four words, "seven ten sea bread"."""
    return Words.of([" ".join(WORDS)] * texts)


def on(feature: int, names: list[int], strengths: list[float]) -> list[tuple[int, int, int, float]]:
    """The feature is active on one word in each text."""
    places = zip(names, strengths, strict=True)
    return [(feature, text, 4 * text + name, strength) for text, (name, strength) in enumerate(places)]


def chosen(*entries: list[tuple[int, int, int, float]], rule: Rule = RULE, meaning: Meaning = MEANING) -> list[Choice]:
    return choose(activations(*chain(*entries)), words(4), 16, meaning, 10, rule)


def test_the_score_is_nearness_times_evenness_times_the_root_of_variety() -> None:
    (found,) = chosen(on(5, [SEVEN, TEN, SEVEN, TEN], [4.0, 3.0, 3.0, 2.0]))
    assert found.feature == 5
    assert found.stems == {"seve", "ten"}
    assert found.score == pytest.approx(0.9 * (2.0 / 4.0) * math.sqrt(2.0))


def test_words_of_like_meaning_come_before_words_that_nothing_connects() -> None:
    found = chosen(on(1, [SEA, BREAD, SEA, BREAD], [2.0] * 4), on(2, [SEVEN, TEN, SEVEN, TEN], [2.0] * 4))
    assert [one.feature for one in found] == [2, 1]


def test_features_that_are_on_one_word_on_few_texts_or_everywhere_are_left_out() -> None:
    one_word = on(1, [SEVEN, SEVEN, SEVEN, TEN], [2.0] * 4)
    few_texts = on(2, [SEVEN, TEN], [2.0] * 2)
    everywhere = [(3, text, 4 * text + name, 2.0) for text in range(4) for name in (SEVEN, TEN, SEA)]
    assert chosen(one_word, few_texts, everywhere) == []
    loose = Rule(texts=2, top=4, frequency=1.0, on_one_word=1.0, distinct=1, shared=1.0)
    assert {one.feature for one in chosen(one_word, few_texts, everywhere, rule=loose)} == {1, 2, 3}


def test_words_must_be_plain() -> None:
    numbers = Meaning(MEANING.vectors, np.array([False, False, True, True]))
    assert chosen(on(1, [SEVEN, TEN, SEVEN, TEN], [2.0] * 4), meaning=numbers) == []


def test_nearness_is_the_mean_cosine_of_all_pairs() -> None:
    # seven-ten 0.8, seven-bread 0, ten-bread 0.6, each twice; each with itself 1
    assert nearness(np.array([SEVEN, TEN, BREAD]), MEANING) == pytest.approx((2 * 1.4 + 3) / 9)
    assert nearness(np.array([SEVEN, SEVEN, SEVEN, TEN]), MEANING) == pytest.approx((6 * 0.8 + 10) / 16)
    assert nearness(np.array([SEA, BREAD]), MEANING) == pytest.approx(0.5)


def test_variety_is_how_many_there_are_in_effect() -> None:
    assert variety(["a", "a", "a"]) == pytest.approx(1.0)
    assert variety(["a", "b", "c", "d"]) == pytest.approx(4.0)


def test_a_feature_like_a_better_one_is_left_out() -> None:
    first = Choice(1, 0.9, frozenset({"king", "quee", "prin"}))
    like_it = Choice(2, 0.8, frozenset({"king", "quee"}))
    other = Choice(3, 0.7, frozenset({"sea", "wave", "king"}))
    assert diverse([first, like_it, other], 10, 0.34) == [first, other]
    assert diverse([first, other], 1, 0.34) == [first]


def test_the_halves_are_halves_and_equal_texts_stay_together() -> None:
    texts = [f"text {number}" for number in range(1000)]
    first = halves(texts)
    assert 450 <= first.sum() <= 550
    assert halves(texts[::-1]).tolist() == first[::-1].tolist()
