"""Texts one behind another in windows of full length, as pretraining has them.

Counts tokens and rows and holds one open window; writes no file and knows no tokenizer.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tokens import Rules


@dataclass
class _Open:
    """The window that is being filled, as far as it is."""

    start: int
    row: int
    length: int = 0
    real: int = 0
    leads: bool = False


class Packing:
    """Puts texts into windows. Between two in one window stands the separator, never at a window's beginning or end."""

    def __init__(self, rules: Rules) -> None:
        self._rules, self._separator = rules, np.asarray(rules.separator, "<i4")
        self._written = self._rows = 0
        self._open = _Open(0, 0)

    def place(self, ids_T: NDArray[np.int32], own_T: NDArray[np.bool_]) -> tuple[list[NDArray[Any]], list[Any]]:
        """Put a text behind those before.

        Args:
            ids_T: its tokens.
            own_T: which of them are rows.

        Returns:
            What follows in the file of tokens, and the `WINDOW`s that are full now.

        """
        tokens, full = self._separated() if len(ids_T) else ([], [])
        at = 0
        while at < len(ids_T):
            stop = at + self._rules.body - self._open.length
            tokens.append(self._fill(ids_T[at:stop], own_T[at:stop]))
            at = stop
            if self._open.length == self._rules.body:
                full.append(self._close())
        return tokens, full

    def rest(self) -> list[Any]:
        """The last window, which need not be full."""
        return [self._close()] if self._open.length else []

    def _separated(self) -> tuple[list[NDArray[Any]], list[Any]]:
        """Make room for another text: behind a separator, or in a window of its own if there is none left here."""
        if not self._open.length:
            return [], []
        if self._open.length + len(self._separator) >= self._rules.body:
            return [], [self._close()]
        return [self._fill(self._separator, np.zeros(len(self._separator), bool))], []

    def _fill(self, ids_T: NDArray[Any], own_T: NDArray[np.bool_]) -> NDArray[Any]:
        if not self._open.length:
            self._open.leads = bool(own_T[0]) and not self._rules.frame.before
        self._open.length += len(ids_T)
        self._open.real += int(own_T.sum())
        self._written += len(ids_T)
        self._rows += int(own_T.sum())
        return ids_T

    def _close(self) -> Any:
        done, self._open = self._open, _Open(self._written, self._rows)
        return done.start, done.length, done.real, done.row, done.leads
