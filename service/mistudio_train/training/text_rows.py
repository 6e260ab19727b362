"""Makes one row a text of one row a token, as the bundle wants it.

Owns that reduction, over blocks whose ends may fall inside a text; must not run an SAE or touch a disk.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .files import refused


@dataclass
class _Open:
    """A text of which more tokens may come."""

    text: int
    maxima: Tensor
    """[d_sae]"""
    sums: Tensor
    """[d_in]"""
    tokens: int


def one_row_a_text(blocks: Iterable[tuple[Tensor, Tensor, Tensor]], n_texts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token rows to text rows: of features the maximum over the text's tokens, of activations the mean.

    A text without any token (nothing but special ones) has no active feature: its rows are zeros.

    Args:
        blocks: `acts_BF` (none negative), `x_BD`, and `text_B`, which text each row is of, ascending.
        n_texts: row i of all that is given belongs to text i, for i up to this.

    Raises:
        ExportRefused: if a row's text is out of order or range.

    """
    unfinished: _Open | None = None
    done = 0
    for acts_BF, x_BD, text_B in blocks:
        if not len(text_B):
            continue
        _check_order(text_B, unfinished.text if unfinished else 0, n_texts)
        texts = _reduced(acts_BF, x_BD, text_B)
        if unfinished and unfinished.text == texts[0].text:
            texts[0] = _joined(unfinished, texts[0])
        elif unfinished:
            texts.insert(0, unfinished)
        *finished, unfinished = texts
        yield _rows(finished, done, unfinished.text, unfinished)
        done = unfinished.text
    if unfinished:
        yield _rows([unfinished], done, n_texts, unfinished)


def _check_order(text_B: Tensor, least: int, n_texts: int) -> None:
    if int(text_B[0]) < least or int(text_B[-1]) >= n_texts or bool((text_B.diff() < 0).any()):
        raise refused(f"rows of tokens are not in the order of their texts, of which there are {n_texts}")


def _reduced(acts_BF: Tensor, x_BD: Tensor, text_B: Tensor) -> list[_Open]:
    text_T, tokens_T = torch.unique_consecutive(text_B, return_counts=True)
    lengths = tokens_T.tolist()
    pieces = zip(text_T.tolist(), torch.split(acts_BF, lengths), torch.split(x_BD, lengths), lengths, strict=True)
    return [_Open(text, acts_LF.amax(0), x_LD.sum(0), tokens) for text, acts_LF, x_LD, tokens in pieces]


def _joined(first: _Open, more: _Open) -> _Open:
    maxima = torch.maximum(first.maxima, more.maxima)
    return _Open(first.text, maxima, first.sums + more.sums, first.tokens + more.tokens)


def _rows(texts: list[_Open], begin: int, end: int, like: _Open) -> tuple[Tensor, Tensor]:
    """Rows `begin` to `end`, zeros where none of `texts` is."""
    acts_TF = like.maxima.new_zeros(end - begin, len(like.maxima))
    x_TD = like.sums.new_zeros(end - begin, len(like.sums))
    for text in texts:
        acts_TF[text.text - begin] = text.maxima
        x_TD[text.text - begin] = text.sums / text.tokens
    return acts_TF, x_TD
