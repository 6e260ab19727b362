"""Tokens and texts as people see them: all of it, in order, and nothing that acts."""

import unicodedata

import pytest

from mistudio_train.training.report.shown import PIECE_MOST, Vocabulary, shown
from tests.models import tiny_tokenizer

TEXT = "The quick fox, naïve café: 日本 \U0001f98a and 3 dogs.  Two spaces, it's fine"


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bert", "roberta", "opt"])
def test_the_pieces_together_are_the_text(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    pieces = Vocabulary(tokenizer).pieces(ids)
    assert len(pieces) == len(ids)
    expected = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "".join("".join(pieces).split()) == "".join(expected.split())


def test_words_keep_the_space_before_them() -> None:
    for family in ("gpt2", "llama"):
        tokenizer = tiny_tokenizer(family)
        ids = tokenizer("over the lazy dog", add_special_tokens=False)["input_ids"]
        assert "".join(Vocabulary(tokenizer).pieces(ids)).strip() == "over the lazy dog", family


def test_parts_of_one_character_are_shown_once() -> None:
    tokenizer = tiny_tokenizer("gpt2")
    ids = tokenizer("\U0001f98a", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    assert Vocabulary(tokenizer).pieces(ids) == ["\U0001f98a"] + [""] * (len(ids) - 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\tc", "a⏎b⇥c"),
        ("\x1b[31mred\x07", "␛[31mred␇"),
        ("\u202eevil\u2066", "⟦U+202E⟧evil⟦U+2066⟧"),
        ("zero\u200bwidth", "zero⟦U+200B⟧width"),
        ("\x85\u2028\u2029", "⟦U+0085⟧⟦U+2028⟧⟦U+2029⟧"),
        ("plain <b>&amp; text</b> \U0001f98a", "plain <b>&amp; text</b> \U0001f98a"),
    ],
)
def test_what_steers_is_shown_and_does_not_steer(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_no_control_character_gets_through() -> None:
    everything = "".join(chr(code) for code in range(0x3000) if not 0xD800 <= code < 0xE000)
    for character in shown(everything, 1 << 20):
        assert unicodedata.category(character) not in ("Cc", "Zl", "Zp", "Cs")


def test_long_pieces_are_cut() -> None:
    assert shown("x" * 1_000_000, PIECE_MOST) == "x" * PIECE_MOST + "…"
