"""What a tokenised corpus is: its tokens on the scratch disk, the windows that go through the model, and the rows.

Knows no tokenizer and no model; `tokenization` makes one.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from mistudio_schemas import CorpusInfo

from .disk import ArrayFile

WINDOW: Final = np.dtype([("start", "<i8"), ("length", "<i4"), ("real", "<i4"), ("row", "<i8"), ("leads", "?")])
"""What goes through the model as one sequence, less what frames it: where its tokens begin in the file of tokens, how
many they are, how many real tokens it has in all, its first row, and whether its very first token is a row."""


@dataclass(frozen=True)
class Frame:
    """The special tokens that are put around a text, or around a window."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


@dataclass(frozen=True)
class Rules:
    """What becomes a row."""

    pooling: Literal["mean", "token"]
    include_special_tokens: bool
    length: int
    """Tokens of a sequence at most, special ones included."""
    frame: Frame
    token_budget: int | None = None
    rendered: bool = False
    """Whether the texts are rendered conversations, so that special tokens which they spell out are meant."""
    no_rows: frozenset[int] = frozenset()
    """Ids that are no rows wherever they stand; none where special tokens count."""
    separator: tuple[int, ...] | None = None
    """What stands between two texts that are packed into one window; `None`: each text has windows of its own."""

    @property
    def body(self) -> int:
        """Tokens of a text that fit into one sequence."""
        return self.length - len(self.frame)

    def framed(self, ids_T: NDArray[np.int32]) -> NDArray[np.int32]:
        """A window as the model sees it."""
        before, after = np.asarray(self.frame.before, "<i4"), np.asarray(self.frame.after, "<i4")
        return np.concatenate([before, ids_T, after])

    def real(self, ids_T: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which tokens of the framed window are real ones, which rows are made of."""
        real_T = np.ones(len(ids_T) + len(self.frame), bool)
        if self.include_special_tokens:
            return real_T
        own_T = self._own(ids_T)
        if self.pooling == "mean" and not own_T.any():
            return real_T  # a text of special tokens alone has no others to be the mean of
        real_T[:] = False
        real_T[len(self.frame.before) : len(self.frame.before) + len(ids_T)] = own_T
        return real_T

    def _own(self, ids_T: NDArray[np.int32]) -> NDArray[np.bool_]:
        if not self.no_rows:
            return np.ones(len(ids_T), bool)
        return np.isin(ids_T, self._no_rows, invert=True)

    @cached_property
    def _no_rows(self) -> NDArray[np.int32]:
        return np.fromiter(sorted(self.no_rows), "<i4")


@dataclass(frozen=True)
class RowIndex:
    """Which text, and which token of it, each row is. Files, so that none of it is in memory.

    Rows of a text are contiguous and in the order of its tokens, texts are in the corpus' order.
    """

    starts: ArrayFile
    """int64, one more than there are texts: the first row of each text."""
    text_of_row: ArrayFile
    """int32 [rows]."""
    position_of_row: ArrayFile
    """int32 [rows]: which of its text's real tokens a row is; -1 where the row is a whole text."""
    token_of_row: ArrayFile
    """int32 [rows]: the token's id; -1 where the row is a whole text."""

    def rows_of_text(self, text: int) -> slice:
        """The rows of a text."""
        start, stop = self.starts.read(text, text + 2)
        return slice(int(start), int(stop))


@dataclass(frozen=True)
class Tokens:
    """A tokenised corpus on disk."""

    rules: Rules
    ids: ArrayFile
    """int32: the texts' own tokens, one text after another, as far as they are used; between packed ones separators."""
    windows: ArrayFile
    """`WINDOW`: what goes through the model, one sequence each."""
    index: RowIndex
    corpus: CorpusInfo


def padded(tokens: Tokens, windows: NDArray[Any], pad_id: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Some windows as the model takes them: ids, attention mask and real tokens, [B, T] each.

    Always padded on the right, whatever the tokenizer does. Real tokens are those that rows are made of.
    """
    rules = tokens.rules
    width = int(windows["length"].max()) + len(rules.frame)
    ids_BT = np.full((len(windows), width), pad_id, np.int64)
    mask_BT = np.zeros((len(windows), width), np.int64)
    real_BT = np.zeros((len(windows), width), bool)
    for row, (start, length) in enumerate(zip(windows["start"].tolist(), windows["length"].tolist(), strict=True)):
        ids_T, end = tokens.ids.read(start, start + length), length + len(rules.frame)
        ids_BT[row, :end] = rules.framed(ids_T)
        mask_BT[row, :end] = 1
        real_BT[row, :end] = rules.real(ids_T)
    return ids_BT, mask_BT, real_BT
