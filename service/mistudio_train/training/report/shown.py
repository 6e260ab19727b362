"""Corpus and vocabulary as a person may safely see them: nothing in them acts on a page or a terminal.

Owns what is shown instead of characters that steer, hide or reorder others, and how long a piece may be.
"""

import unicodedata
from typing import Any, Final

PIECE_MOST: Final = 40
"""Characters of a token: some vocabularies have tokens of hundreds of spaces or equal signs."""
TEXT_MOST: Final = 400
"""Of a whole text."""
REPLACED: Final = "\ufffd"
"""What a tokenizer gives for a part of a character."""
HIDDEN: Final = frozenset("\u061c\u200b\u200e\u200f\u2060\u2066\u2067\u2068\u2069\u202a\u202b\u202c\u202d\u202e\ufeff")
"""Turn or hide the text around them."""


def shown(text: str, most: int = TEXT_MOST) -> str:
    """The text in one line: line ends as ⏎, tabs as ⇥, other control characters as their pictures or numbers."""
    cut = text[:most]
    return "".join(map(_shown, cut)) + ("…" if len(text) > most else "")


def _shown(character: str) -> str:
    if character == "\n":
        return "⏎"
    if character == "\t":
        return "⇥"
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if character in HIDDEN or unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"⟦U+{code:04X}⟧"
    return character


class Vocabulary:
    """Tokens as the text that they stand for, each looked up once.

    Args:
        tokenizer: the model's.

    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        anchor = tokenizer("a", add_special_tokens=False, return_attention_mask=False)["input_ids"]
        # Behind another token, as some tokenizers leave out the space before the first one.
        self._anchor = [int(token) for token in anchor]
        self._anchored = self._decode(self._anchor)
        self._known: dict[int, str] = {}

    def piece(self, token: int) -> str:
        """One token's own text, not yet made safe; "�" in it where it holds a part of a character."""
        if token not in self._known:
            self._known[token] = self._behind_anchor([token])
        return self._known[token]

    def pieces(self, tokens: list[int]) -> list[str]:
        """Of consecutive tokens; those that share characters have their text at the first, the others none."""
        found = [self.piece(token) for token in tokens]
        at = 0
        while at < len(found):
            end = at
            while end < len(found) and REPLACED in found[end]:
                end += 1
            if end - at > 1:
                found[at:end] = [self._behind_anchor(tokens[at:end])] + [""] * (end - at - 1)
            at = max(end, at + 1)
        return found

    def shown(self, token: int) -> str:
        """One token alone, safe."""
        return shown(self.piece(token), PIECE_MOST)

    def _behind_anchor(self, tokens: list[int]) -> str:
        together = self._decode(self._anchor + tokens)
        if together.startswith(self._anchored):
            return together[len(self._anchored) :]
        return self._decode(tokens)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text
