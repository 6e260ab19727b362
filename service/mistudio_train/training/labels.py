"""The labels of a corpus' texts on the scratch disk: a number a text, and what each number stands for.

Owns that file and which values are labels; knows no corpus format, and not what they are for.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from .disk import ArrayFile, ArrayWriter

NONE: Final = -1
"""The number of a text without a label."""
MOST_LABELS: Final = 1000
"""Different ones; a column of more is no column of labels."""
MOST_CHARACTERS: Final = 200
FILE: Final = "labels.bin"


@dataclass(frozen=True)
class Labels:
    """Of all texts, in their order."""

    column: str
    """What the requester calls them."""
    names: tuple[str, ...]
    """Of each number, in the order in which they were met."""
    numbers: ArrayFile
    """int32 [texts]."""

    def first(self, count: int) -> NDArray[np.int32]:
        """Of the first so many texts; `NONE` where one has no label."""
        return self.numbers.read(0, min(count, len(self.numbers)))


class LabelsWriter:
    """Appends labels; a context manager, after which `labels` gives them to be read."""

    def __init__(self, folder: Path, column: str) -> None:
        self._writer, self._column = ArrayWriter(folder / FILE, np.int32), column
        self._numbers: dict[str, int] = {}

    def append(self, value: Any) -> None:
        """One text's.

        Args:
            value: a text, a whole number (also one that is written 3.0), true or false; `None`, NaN or an empty text:
                it has none.

        Raises:
            ValueError: if it is no label, saying why.

        """
        self._writer.append(self._number(value))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: TracebackType | BaseException | None) -> None:
        self._writer.__exit__(kind, *rest)

    @property
    def labels(self) -> Labels:
        """All of them, once the file is closed."""
        return Labels(self._column, tuple(self._numbers), ArrayFile(self._writer.path, np.int32))

    def _number(self, value: Any) -> int:
        if isinstance(value, float):
            value = None if math.isnan(value) else int(value) if value.is_integer() else value
        if value is None or value == "":
            return NONE
        if not isinstance(value, str | int):  # true and false are whole numbers to Python
            raise ValueError(f"a label is a text, a whole number, true or false, and this is a {type(value).__name__}")
        name = value if isinstance(value, str) else str(value).lower()
        if not name.isprintable() and any("\ud800" <= character <= "\udfff" for character in name):
            raise ValueError("half a surrogate pair, which is no character")
        if len(name) > MOST_CHARACTERS:
            raise ValueError(f"a label has at most {MOST_CHARACTERS} characters, and this has {len(name)}")
        number = self._numbers.setdefault(name, len(self._numbers))
        if number >= MOST_LABELS:
            raise ValueError(f"the column '{self._column}' has more than {MOST_LABELS} different values: no labels")
        return number
